"""What a file is, whatever its name says; and that what decodes here decodes in training."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data.inspection import FORMATS, ImageFlag, ImageHeader, inspect, inspect_all, make_decodable, read_header
from pipeline.data.preprocessing import decode, decode_jpeg
from pipeline.data.scan_cache import ScanCache
from pipeline.data.sources.base import LabeledImage
from pipeline.data.sources.files import FileSource
from pipeline.data.splits import HASH_DISTANCE


def smooth(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    planes = [
        Image.fromarray(coarse[..., i]).resize((width, height), Image.Resampling.BICUBIC) for i in range(channels)
    ]
    return np.stack([np.asarray(plane) for plane in planes], -1)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(rows: np.ndarray, width: int, depth: int, color: int) -> bytes:
    """A PNG from packed rows, uint8 (H, bytes), for what Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, color, 0, 0, 0)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def bmp(rows: np.ndarray, width: int, bits: int, palette: bytes) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, len(rows), 1, bits, 0, rows.size, 0, 0, len(palette) // 4, 0)
    start = 14 + len(info) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + rows.size, 0, 0, start) + info + palette + rows[::-1].tobytes()


def decoded(file: bytes) -> np.ndarray:
    """The image as training sees it."""
    facts, decodable = inspect(file), make_decodable(file, "white")
    assert not isinstance(facts, str)
    assert not isinstance(decodable, str)
    return decode(tf.constant(decodable[0]), tf.constant(int(facts["orientation"]))).numpy()


def on_white(colors: np.ndarray) -> np.ndarray:
    """Gray or RGB with alpha, uint8 (H, W, 2 or 4), on white: (H, W, 3)."""
    alpha = colors[..., -1:].astype(int)
    shown = (colors[..., :-1].astype(int) * alpha + 255 * (255 - alpha)) / 255
    return np.broadcast_to(np.rint(shown).astype(np.uint8), (*colors.shape[:2], 3))


@pytest.mark.parametrize(
    ("color", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)], ids=["gray", "rgb", "gray+alpha", "rgb+alpha"]
)
def test_16_bits_keep_their_upper_8_and_are_not_clipped(color: int, channels: int) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (45, 70, channels)).astype(np.uint16)
    file = png(deep.astype(">u2").reshape(45, -1).view(np.uint8), 70, 16, color)
    upper = (deep >> 8).astype(np.uint8)
    wanted = on_white(upper) if channels in (2, 4) else np.broadcast_to(upper, (45, 70, 3))
    np.testing.assert_array_equal(decoded(file), wanted)
    header = read_header(file)
    assert isinstance(header, ImageHeader)
    assert header.flags == ImageFlag.HIGH_BIT_DEPTH | (ImageFlag.GRAY if channels < 3 else 0) | (
        ImageFlag.TRANSPARENT if channels in (2, 4) else 0
    )


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_few_bits_are_spread_over_the_whole_range(depth: int) -> None:
    values = np.random.default_rng(0).integers(0, 2**depth, (45, 72))
    bits = (values[..., None] >> np.arange(depth)[::-1]) & 1
    file = png(np.packbits(bits.reshape(45, -1), axis=1), 72, depth, 0)
    np.testing.assert_array_equal(decoded(file)[..., 1], values * 255 // (2**depth - 1))


def test_cmyk_becomes_the_rgb_that_pillow_shows() -> None:
    inks = Image.frombytes("CMYK", (70, 45), smooth(45, 70, 4).tobytes())
    file = encode(inks, "JPEG", quality=98)
    shown = np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int)
    assert np.abs(decoded(file) - shown).max() <= 1
    assert inspect(file)["traits"] == ImageFlag.CMYK


@pytest.mark.parametrize("options", [{}, {"transparency": 3}, {"bits": 4}], ids=["256", "transparent", "16"])
def test_palettes_are_looked_up(options: dict[str, int]) -> None:
    image = Image.fromarray(smooth(45, 70)).quantize(13 if "bits" in options else 200)
    file = encode(image, **options)
    shown = np.array(image.convert("RGB"))
    if "transparency" in options:
        shown[np.asarray(image) == 3] = 255
    np.testing.assert_array_equal(decoded(file), shown)
    assert inspect(file)["traits"] == ImageFlag.PALETTE | (ImageFlag.TRANSPARENT if "transparency" in options else 0)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_transparent_image_is_put_on_the_background(mode: str, kind: str) -> None:
    colors = smooth(45, 70, 2 if mode == "LA" else 4)
    colors[:20, :, -1] = 0
    file = encode(Image.fromarray(colors), kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(decoded(file), on_white(colors))
    assert inspect(file)["traits"] & ImageFlag.TRANSPARENT
    on_black, _ = make_decodable(file, "black")
    assert (decode(tf.constant(on_black), tf.constant(1)).numpy()[:20] == 0).all()


def test_an_image_whose_alpha_is_opaque_throughout_is_decoded_as_one_without() -> None:
    colors = smooth(45, 70, 4)
    colors[..., -1] = 255
    file = encode(Image.fromarray(colors))
    assert make_decodable(file, "black")[0] is file
    assert inspect(file)["traits"] == 0
    np.testing.assert_array_equal(decoded(file), colors[..., :3])


def test_a_bmp_with_a_palette_is_decoded_by_pillow_and_a_gray_one_is_not() -> None:
    rows = np.ascontiguousarray(smooth(45, 72)[..., 0])
    colorful = b"".join(bytes([i, 255 - i, i * 7 % 256, 0]) for i in range(256))
    values = rows.astype(int)
    wanted = np.stack([values * 7 % 256, 255 - values, values], -1)
    np.testing.assert_array_equal(decoded(bmp(rows, 72, 8, colorful)), wanted)
    assert inspect(bmp(rows, 72, 8, colorful))["traits"] == ImageFlag.PALETTE | ImageFlag.PILLOW
    gray = bmp(rows, 72, 8, b"".join(bytes([i, i, i, 0]) for i in range(256)))
    np.testing.assert_array_equal(decoded(gray), np.repeat(rows[..., None], 3, 2))
    assert inspect(gray)["traits"] == ImageFlag.GRAY


def test_animations_give_their_first_image() -> None:
    frames = [Image.fromarray(smooth(45, 70, seed=seed)) for seed in range(3)]
    for kind in ("GIF", "PNG", "WEBP"):
        first, *others = [frame.quantize(100) if kind == "GIF" else frame for frame in frames]
        options = {"lossless": True} if kind == "WEBP" else {}
        file = encode(first, kind, save_all=True, append_images=others, **options)
        np.testing.assert_array_equal(decoded(file), np.asarray(first.convert("RGB")))
        assert inspect(file)["traits"] & ImageFlag.ANIMATED


def test_a_gif_whose_first_image_does_not_fill_the_canvas_is_the_canvas() -> None:
    file = bytearray(encode(Image.fromarray(smooth(45, 70)).quantize(100), "GIF"))
    file[6:10] = struct.pack("<HH", 100, 80)
    facts = inspect(bytes(file))
    assert (facts["height"], facts["width"]) == decoded(bytes(file)).shape[:2] == (80, 100)
    assert facts["traits"] & ImageFlag.PILLOW


@pytest.mark.parametrize("kind", FORMATS)
def test_a_cut_file_of_any_format_is_found(kind: str) -> None:
    options = {
        "MPO": {"save_all": True, "append_images": [Image.new("RGB", (70, 45))]},
        "WEBP": {"lossless": True},
    }.get(kind, {})
    whole = encode(
        Image.fromarray(smooth(45, 70)).quantize(100) if kind == "GIF" else Image.fromarray(smooth(45, 70)),
        kind,
        **options,
    )
    assert not isinstance(inspect(whole), str)
    for keep in (0.1, 0.4):
        assert isinstance(inspect(whole[: int(len(whole) * keep)]), str)


LARGE = {
    progressive: encode(Image.fromarray(smooth(600, 800)), "JPEG", quality=90, progressive=progressive)
    for progressive in (False, True)
}


@settings(max_examples=60, deadline=None)
@given(progressive=st.booleans(), place=st.floats(0, 1), how=st.integers(0, 2), seed=st.integers(0, 2**32 - 1))
def test_a_damaged_jpeg_fails_at_every_ratio_or_at_none(progressive: bool, place: float, how: int, seed: int) -> None:
    file, rng = bytearray(LARGE[progressive]), np.random.default_rng(seed)
    at = 2 + int(place * (len(file) - 3))
    length = int(rng.integers(1, 200))
    if how == 0:
        del file[at:]
    else:
        file[at : at + length] = bytes(length) if how == 1 else rng.bytes(length)

    def fails(ratio: int) -> bool:
        try:
            decode_jpeg(bytes(file), ratio)
        except tf.errors.InvalidArgumentError:
            return True
        return False

    assert len({fails(ratio) for ratio in (1, 2, 4, 8)}) == 1
    assert how != 0 or fails(8)


def test_an_image_and_its_smaller_copy_have_nearly_one_hash_whatever_ratio_they_are_decoded_at() -> None:
    for seed in range(10):
        image = Image.fromarray(smooth(700, 900, seed=seed))
        hashes = [
            int(inspect(encode(image.resize(size), "JPEG"))["phash"])
            for size in ((900, 700), (450, 350), (225, 175), (150, 117))
        ]
        assert all((hashes[0] ^ other).bit_count() <= HASH_DISTANCE for other in hashes)


@pytest.fixture
def folder(tmp_path: Path) -> FileSource:
    for seed in range(40):
        (tmp_path / f"{seed:02}.png").write_bytes(encode(Image.fromarray(smooth(40, 50, seed=seed))))
    rows = tuple(LabeledImage(path.name, 0, None) for path in sorted(tmp_path.glob("*.png")))
    return FileSource(tmp_path, ("a",), rows)


def look(folder: FileSource, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, dict[int, str], list[str]]:
    """The facts, the problems, and the files that were read for them."""
    read: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(FileSource, "read", lambda self, key: [read.append(key), (self.root / key).read_bytes()][1])
        facts, problems = inspect_all(folder, folder.list_images(), ScanCache(folder.root))
    return facts, problems, sorted(read)


def test_a_second_scan_reads_only_what_has_changed(folder: FileSource, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _, read = look(folder, monkeypatch)
    assert len(read) == 40
    again, problems, read = look(folder, monkeypatch)
    assert (read, problems) == ([], {})
    np.testing.assert_array_equal(again, first)

    other = encode(Image.fromarray(smooth(41, 50, seed=99)))
    (folder.root / "03.png").write_bytes(other)
    status = (folder.root / "04.png").stat()
    os.utime(folder.root / "04.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    (folder.root / "05.png").write_bytes(b"no image")
    again, problems, read = look(folder, monkeypatch)
    assert read == ["03.png", "04.png", "05.png"]
    assert again["height"][3] == 41
    assert list(problems) == [5]
    _, problems, read = look(folder, monkeypatch)
    assert (read, list(problems)) == (["05.png"], [5]), "bad files are looked at again"


def cache_file(folder: FileSource) -> Path:
    place = ScanCache(folder.root)._path
    assert place is not None
    return place


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "replaced", "of another version"])
def test_a_damaged_cache_is_ignored_and_replaced(
    folder: FileSource, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    first, _, _ = look(folder, monkeypatch)
    path = cache_file(folder)
    content = path.read_bytes()
    flipped = bytes([*content[:500], content[500] ^ 1, *content[501:]])
    path.write_bytes(
        {"cut": content[:-100], "flipped": flipped, "emptied": b"", "replaced": b"x" * 5000}.get(damage, content)
    )
    if damage == "of another version":
        monkeypatch.setattr("pipeline.data.scan_cache.SCAN_VERSION", -1)
    again, _, read = look(folder, monkeypatch)
    assert len(read) == 40
    np.testing.assert_array_equal(again, first)
    assert look(folder, monkeypatch)[2] == []
    assert [other.name for other in path.parent.iterdir() if other.name.startswith(path.name)] == [path.name]


def test_an_interrupted_scan_keeps_what_it_has_seen_and_what_was_known(
    folder: FileSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    for path in list(folder.root.glob("*.png"))[::2]:
        path.touch()
    with pytest.raises(KeyboardInterrupt):
        inspect_all(folder, folder.list_images(), ScanCache(folder.root), interrupt)
    read = look(folder, monkeypatch)[2]
    assert len(read) == 30
    (folder.root / "00.png").touch()
    with pytest.raises(KeyboardInterrupt):
        inspect_all(folder, folder.list_images(), ScanCache(folder.root), interrupt)
    assert look(folder, monkeypatch)[2] == []


def test_two_scans_at_once_leave_one_whole_cache(folder: FileSource, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = [ScanCache(folder.root), ScanCache(folder.root)]
    for cache in caches:
        inspect_all(folder, folder.list_images(), cache)
    assert look(folder, monkeypatch)[2] == []


def test_a_cache_that_cannot_be_written_is_done_without(
    folder: FileSource, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(look(folder, monkeypatch)[2]) == 40
    assert len(look(folder, monkeypatch)[2]) == 40

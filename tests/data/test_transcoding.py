"""Every file that Pillow opens is seen as Pillow shows it: first frame, upright, on the background."""

import io
import struct
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin
from test_inspection import bmp, encode, png, smooth

from pipeline.config.data import Background, DataConfig
from pipeline.config.schema import Config
from pipeline.data.data_service import check_servable
from pipeline.data.input_pipeline import evaluation_stream, training_stream
from pipeline.data.inspection import ImageFlag, inspect, make_decodable, packable, read_header
from pipeline.data.pack_inputs import SourceInput
from pipeline.data.packing import ShardLimit, pack
from pipeline.data.preprocessing import decode, decode_jpeg, decode_on_background
from pipeline.data.sources.folder import open_folder
from pipeline.data.sources.pack import open_pack
from pipeline.data.transcoding import lacks_end_marker
from pipeline.data.validation import scan
from pipeline.errors import DataError

H, W = 45, 72
RGB_IMAGE = Image.fromarray(smooth(H, W))
RGBA_IMAGE = Image.fromarray(np.dstack([smooth(H, W), smooth(H, W, 1, seed=9)]))
GRAY_IMAGE = RGB_IMAGE.convert("L")
PALETTE_IMAGE = RGB_IMAGE.quantize(90)
CMYK_IMAGE = Image.frombytes("CMYK", (W, H), smooth(H, W, 4).tobytes())
FRAMES = [Image.fromarray(smooth(H, W, seed=seed)) for seed in (4, 5)]
DEEP = np.random.default_rng(0).integers(0, 65536, (H, W)).astype(np.uint16)
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="{}"/></x:xmpmeta>'


def bitfields(bits: int, masks: tuple[int, ...], rows: np.ndarray) -> bytes:
    """A BMP whose colors lie where its masks say."""
    info = struct.pack("<IiiHHIIiiII", 56, W, H, 1, bits, 3, rows.nbytes, 0, 0, 0, 0)
    info += b"".join(struct.pack("<I", mask) for mask in (*masks, 0)[:4])
    start = 14 + len(info)
    return b"BM" + struct.pack("<IHHI", start + rows.nbytes, 0, 0, start) + info + rows[::-1].tobytes()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def text_chunks(**texts: str) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_text(name.replace("_", " "), text)
    return info


def without_adobe_marker(jpeg: bytes) -> bytes:
    at = jpeg.index(b"\xff\xee")
    return jpeg[:at] + jpeg[at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big") :]


def generated() -> Iterator[tuple[str, bytes]]:
    """Files of every kind, each with its name."""
    for kind in ("TIFF", "PPM", "TGA", "BMP", "DIB", "PCX", "SGI", "QOI", "JPEG2000", "AVIF", "WEBP", "PNG", "JPEG"):
        for image in (RGB_IMAGE, GRAY_IMAGE, RGBA_IMAGE, PALETTE_IMAGE, PALETTE_IMAGE.convert("1")):
            try:
                yield f"{kind} {image.mode}", encode(image, kind)
            except (OSError, ValueError):  # the format has no such mode
                continue
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        yield f"TIFF {compression}", encode(RGB_IMAGE, "TIFF", compression=compression)
    yield "TIFF fax", encode(PALETTE_IMAGE.convert("1"), "TIFF", compression="group4")
    yield "TIFF CMYK", encode(CMYK_IMAGE, "TIFF")
    yield "TIFF pages", encode(RGB_IMAGE, "TIFF", save_all=True, append_images=FRAMES)
    yield "ICO", encode(RGBA_IMAGE.resize((64, 64)), "ICO", sizes=[(64, 64)])
    yield "JPEG CMYK", encode(CMYK_IMAGE, "JPEG", quality=98)
    yield "JPEG CMYK without Adobe's marker", without_adobe_marker(encode(CMYK_IMAGE, "JPEG", quality=98))
    yield "JPEG progressive", encode(RGB_IMAGE, "JPEG", progressive=True)
    yield "MPO", encode(RGB_IMAGE, "MPO", save_all=True, append_images=FRAMES)
    yield "GIF", encode(PALETTE_IMAGE, "GIF")
    yield "GIF transparent", encode(PALETTE_IMAGE, "GIF", transparency=7)
    moved = bytearray(encode(PALETTE_IMAGE, "GIF"))
    moved[6:10] = struct.pack("<HH", W + 9, H + 20)
    yield "GIF with a larger canvas", bytes(moved)
    for kind, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True})):
        yield f"{kind} animated", encode(RGB_IMAGE, kind, save_all=True, append_images=FRAMES, **options)
        yield f"{kind} animated RGBA", encode(RGBA_IMAGE, kind, save_all=True, append_images=FRAMES, **options)
    yield "APNG with a default image", encode(RGB_IMAGE, "PNG", save_all=True, append_images=FRAMES, default_image=True)
    yield "PNG palette with alpha", encode(PALETTE_IMAGE, transparency=bytes(range(0, 180, 2)))
    yield "PNG with a transparent color", encode(RGB_IMAGE, transparency=RGB_IMAGE.getpixel((3, 3)))
    yield "PNG gray with a transparent value", encode(GRAY_IMAGE, transparency=GRAY_IMAGE.getpixel((3, 3)))
    indices = np.ascontiguousarray(smooth(H, W)[..., 0])
    yield "BMP of 8 bits with a palette", bmp(indices, W, 8, np.random.default_rng(1).bytes(1024))
    yield "BMP of 1 bit", bmp(np.resize(indices, (H, 12)), W, 1, b"\x10\x20\x30\0\xff\xee\xdd\0")
    yield "BMP of 4 bits", bmp(np.ascontiguousarray(indices[:, : W // 2]), W, 4, np.random.default_rng(2).bytes(64))
    words = np.random.default_rng(3).integers(0, 65536, (H, W)).astype("<u2")
    yield "BMP of 16 bits", bitfields(16, (0xF800, 0x7E0, 0x1F), words)
    double = np.random.default_rng(3).integers(0, 2**32, (H, W)).astype("<u4")
    for masks in ((0xFF0000, 0xFF00, 0xFF), (0xFF000000, 0xFF0000, 0xFF00)):
        yield f"BMP of 32 bits, red at {masks[0]:x}", bitfields(32, masks, double)
    yield "BMP with more behind it", encode(RGB_IMAGE, "BMP") + bytes(30)
    for orientation in range(2, 9):
        for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF"):
            image = RGB_IMAGE if kind != "TIFF" or orientation % 2 else RGBA_IMAGE
            yield f"{kind} turned by EXIF {orientation}", encode(image, kind, exif=exif(orientation))
        tags = b"Exif\0\0" + exif(orientation).tobytes().removeprefix(b"Exif\0\0")
        profile = f"\nexif\n{len(tags):8}\n{tags.hex()}\n"
        yield (
            f"PNG turned by ImageMagick {orientation}",
            encode(RGB_IMAGE, pnginfo=text_chunks(Raw_profile_type_exif=profile)),
        )
        xmp = XMP.format(orientation)
        yield f"JPEG turned by XMP {orientation}", encode(RGB_IMAGE, "JPEG", xmp=xmp.encode())
        yield f"WEBP turned by XMP {orientation}", encode(RGB_IMAGE, "WEBP", xmp=xmp.encode())
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp)
        yield f"PNG turned by XMP {orientation}", encode(RGB_IMAGE, pnginfo=info)


FILES = dict(generated())


def as_pillow_shows(file: bytes, background: str = "white") -> np.ndarray:
    with Image.open(io.BytesIO(file)) as opened:
        opened.load()
        image = ImageOps.exif_transpose(opened)
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"))
    canvas = Image.new("RGBA", image.size, background)
    canvas.alpha_composite(image.convert("RGBA"))
    return np.asarray(canvas.convert("RGB"))


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_seen_as_pillow_shows_it(name: str) -> None:
    file = FILES[name]
    facts, decodable = inspect(file), make_decodable(file, "white")
    assert not isinstance(facts, str), facts
    assert not isinstance(decodable, str)
    seen = decode(tf.constant(decodable[0]), tf.constant(int(facts["orientation"]))).numpy()
    shown = as_pillow_shows(file)
    assert seen.shape == shown.shape
    lossy = name.startswith(("JPEG ", "MPO", "WEBP "))
    assert np.abs(seen.astype(int) - shown).max() <= (3 if lossy else 0)
    sides = shown.shape[:2] if facts["orientation"] < 5 else shown.shape[1::-1]
    assert (facts["height"], facts["width"]) == sides


@pytest.mark.parametrize("background", ["white", "black"])
def test_exports_put_a_transparent_png_on_the_background_as_training_does(background: Background) -> None:
    for name in ("PNG RGB", "PNG L", "PNG RGBA", "PNG palette with alpha", "PNG with a transparent color", "JPEG RGB"):
        decodable = make_decodable(FILES[name], background)
        assert not isinstance(decodable, str)
        seen = decode(tf.constant(decodable[0]), tf.constant(1))
        exported = decode_on_background(tf.constant(FILES[name]), tf.constant(1), background)
        np.testing.assert_array_equal(exported.numpy(), seen.numpy())


def test_the_kinds_are_decoded_by_pillow_only_where_needed() -> None:
    by_pillow = {
        name for name, file in FILES.items() if read_header(file).flags & (ImageFlag.PILLOW | ImageFlag.TRANSPARENT)
    }
    plain = {
        "JPEG RGB",
        "JPEG L",
        "JPEG CMYK",
        "PNG RGB",
        "PNG P",
        "PNG 1",
        "WEBP RGB",
        "BMP RGB",
        "BMP L",
        "GIF",
        "MPO",
    }
    assert not by_pillow & plain
    assert {"TIFF RGB", "BMP P", "BMP 1", "PNG RGBA", "JPEG CMYK without Adobe's marker", "PNG animated"} <= by_pillow


@pytest.mark.parametrize("bits", [12, 16])
def test_deep_gray_keeps_its_upper_8_bits_in_every_format(bits: int) -> None:
    deep = DEEP >> (16 - bits)
    files = {
        "PNG": png(deep.astype(">u2").view(np.uint8), W, 16, 0),
        "TIFF": encode(Image.fromarray(deep), "TIFF"),
        "PGM": f"P5 {W} {H} 65535\n".encode() + deep.astype(">u2").tobytes(),
    }
    for file in files.values():
        facts, decodable = inspect(file), make_decodable(file, "white")
        assert facts["traits"] & ImageFlag.HIGH_BIT_DEPTH
        seen = decode(tf.constant(decodable[0]), tf.constant(1)).numpy()
        np.testing.assert_array_equal(seen, np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, 2))


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (encode(Image.new("F", (9, 9)), "TIFF"), "holds 32-bit numbers, whose range is not stated"),
        (encode(Image.new("I", (9, 9)), "TIFF"), "holds 32-bit numbers, whose range is not stated"),
        (encode(Image.new("LAB", (9, 9)), "TIFF"), "has colors in CIELAB"),
        (encode(RGB_IMAGE, "EPS"), "is EPS, a program"),
        (bitfields(32, (1, 2, 4), np.zeros((H, W), "<u4")), "is of a kind that Pillow does not decode"),
        (encode(RGB_IMAGE, "TIFF")[:-500], "is a damaged TIFF"),
        (encode(RGB_IMAGE, "JPEG2000")[:300], "is a damaged JPEG2000"),
        (b"BM" + encode(RGB_IMAGE, "BMP")[2:28] + b"\x02" + encode(RGB_IMAGE, "BMP")[29:], "is of a kind that Pillow"),
    ],
)
def test_what_has_no_defined_colors_or_is_damaged_is_refused_with_the_reason(file: bytes, reason: str) -> None:
    assert str(inspect(file)).startswith(reason)
    assert str(make_decodable(file, "white")).startswith(reason)


def test_heic_needs_the_extra_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pillow_heif")
    file = encode(RGB_IMAGE, "HEIF", quality=90)
    facts = inspect(file)
    assert facts["kind"] == b"HEIF"
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
    assert "'.[heif]'" in str(inspect(file))


JPEGS = {
    name: encode(Image.fromarray(smooth(120, 160)), "JPEG", quality=92, **options)
    for name, options in {
        "baseline": {},
        "progressive": {"progressive": True},
        "with restarts": {"restart_marker_blocks": 4},
    }.items()
}


@pytest.mark.parametrize("name", JPEGS)
@pytest.mark.parametrize("tail", [b"", b"\xff", bytes(700), b"\r\n"], ids=["nothing", "half", "zeros", "line end"])
def test_a_jpeg_that_lacks_only_its_end_marker_has_the_pixels_of_the_whole_one(name: str, tail: bytes) -> None:
    whole = JPEGS[name]
    file = whole[:-2] + tail
    assert lacks_end_marker(file)
    facts, decodable = inspect(file), make_decodable(file, "white")
    assert facts["traits"] == ImageFlag.UNTERMINATED
    np.testing.assert_array_equal(decode_jpeg(decodable[0]).numpy(), decode_jpeg(whole).numpy())
    assert packable(file) == decodable[0]


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(list(JPEGS)), cut=st.floats(0, 1))
def test_a_jpeg_that_lacks_data_is_refused(name: str, cut: float) -> None:
    whole = JPEGS[name]
    scan_start = whole.index(b"\xff\xda")
    length = scan_start + int(cut * (len(whole) - 12 - scan_start))
    if name == "progressive" and b"\xff\xc4" in whole[length - 40 : length + 40]:
        return  # between two scans nothing shows that one is missing
    assert str(inspect(whole[:length])).startswith(("is a damaged JPEG", "has a damaged header"))


# --- in the stream ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of TIFF, transparent PNG, JPEG without an end, and plain JPEG."""
    for number in range(24):
        image = Image.fromarray(smooth(60 + number, 80, 4, seed=number))
        file = [
            lambda image: encode(image.convert("RGB"), "TIFF", exif=exif(6)),
            encode,
            lambda image: encode(image.convert("RGB"), "JPEG")[:-2],
            lambda image: encode(image.convert("RGB"), "JPEG"),
        ][number // 2 % 4](image)
        path = tmp_path / "data" / ("train" if number < 16 else "test") / "ab"[number % 2] / f"{number:02}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file)
    return tmp_path / "data"


def config_of(path: Path, **data: object) -> Config:
    return Config.model_validate(
        {
            "model": {"variant": {"width": 0.3, "depth": 0.3, "resolution": 32}, "weights": None},
            "data": {"source": "folder", "path": path, "splits": {"train": 0.8, "val": 0.1, "test": 0.1}, **data},
            "train": {"stages": [{"epochs": 1, "trainable": "all"}]},
        }
    )


def batches(stream: tf.data.Dataset, count: int) -> list[tuple[np.ndarray, ...]]:
    return [tuple(part.copy() for part in batch) for batch in stream.take(count).as_numpy_iterator()]


def assert_same(one: list[tuple[np.ndarray, ...]], other: list[tuple[np.ndarray, ...]]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


def test_the_stream_is_the_same_on_any_number_of_threads_and_from_any_step(folder: Path) -> None:
    config = config_of(folder)
    source = open_folder(folder)
    manifest = scan(source, config.data, seed=0)
    assert manifest.transcoded.sum() == 18
    alone = batches(training_stream(manifest, source, config, 4, num_workers=1), 6)
    assert_same(alone, batches(training_stream(manifest, source, config, 4, num_workers=8), 6))
    assert_same(alone[3:], batches(training_stream(manifest, source, config, 4, start_step=3, num_workers=3), 3))


def test_the_background_is_seen_by_training_and_evaluation(folder: Path) -> None:
    source, means = open_folder(folder), {}
    for background in ("white", "black"):
        config = config_of(folder, background=background)
        manifest = scan(source, config.data, seed=0)
        indices = np.arange(len(manifest.table))
        [(images, *_)] = batches(evaluation_stream(manifest, source, config, indices, batch_size=24), 1)
        means[background] = images.mean((1, 2, 3))
    transparent = [Path(key).stem for key in manifest.table["key"][means["white"] > means["black"]]]
    assert sorted(transparent) == [f"{number:02}" for number in range(24) if number // 2 % 4 == 1]
    assert (means["white"] >= means["black"]).all()


def graph_of(stream: tf.data.Dataset) -> str:
    return str(stream._as_serialized_graph())


def test_without_such_a_file_the_graph_holds_no_python_function(folder: Path) -> None:
    plain = folder.parent / "plain"
    for path in folder.rglob("*.tif"):
        copy = plain / path.relative_to(folder).with_suffix(".png")
        copy.parent.mkdir(parents=True, exist_ok=True)
        Image.open(io.BytesIO(make_decodable(path.read_bytes(), "white")[0])).save(copy)
    for path, has_function in ((folder, True), (plain, False)):
        config, source = config_of(path), open_folder(path)
        manifest = scan(source, config.data, seed=0)
        assert ("transcoded" in manifest.table) == has_function
        assert ("PyFunc" in graph_of(training_stream(manifest, source, config, 4))) == has_function


def test_a_pack_holds_what_training_sees_and_is_verified_again(folder: Path, tmp_path: Path) -> None:
    source, out = open_folder(folder), tmp_path / "pack"
    packed = pack(SourceInput(source), out, ShardLimit(1e6), lambda done, total: None)
    assert packed.written == 24
    again = pack(SourceInput(open_folder(folder)), out, ShardLimit(1e6), lambda done, total: None)
    assert again.written == 0
    from_pack = open_pack(out)
    config = config_of(folder)
    originals = scan(source, config.data, seed=0)
    copies = scan(from_pack, DataConfig(source="pack", path=out), seed=0)
    assert copies.transcoded.sum() == 6, "only the transparent ones need a background"
    one, other = (
        batches(
            evaluation_stream(manifest, opened, config, np.arange(24), batch_size=8),
            3,
        )
        for manifest, opened in ((originals, source), (copies, from_pack))
    )
    assert_same(one, other)
    for key in ("train/a/00.tif", "train/a/04.tif"):
        assert from_pack.read(key) == packable(source.read(key)) != source.read(key)
    assert from_pack.read("train/a/02.tif") == source.read("train/a/02.tif")


def test_a_manifest_keeps_which_files_are_transcoded(folder: Path) -> None:
    config = config_of(folder)
    manifest = scan(open_folder(folder), config.data, seed=0)
    loaded = type(manifest).from_bytes(manifest.to_bytes())
    np.testing.assert_array_equal(loaded.transcoded, manifest.transcoded)
    assert "4 TIFF" not in "".join(manifest.notes)
    assert any(note.startswith("6 TIFF files are decoded by Pillow") for note in manifest.notes)
    assert any("6 images have transparency: put on white" in note for note in manifest.notes)


def test_data_servers_refuse_images_that_pillow_decodes(folder: Path) -> None:
    manifest = scan(open_folder(folder), config_of(folder).data, seed=0)
    with pytest.raises(DataError, match=r"12 training images, such as train/a/00.tif, are decoded by Pillow"):
        check_servable(manifest)
    check_servable(replace(manifest, table=manifest.table.drop(columns="transcoded")))


def test_two_threads_that_meet_their_first_tiff_together_both_decode_it() -> None:
    file, results = FILES["TIFF RGB"], []
    threads = [threading.Thread(target=lambda: results.append(make_decodable(file, "white")[0])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(results)) == 1


def test_an_image_that_is_damaged_after_the_scan_is_named(folder: Path) -> None:
    config, source = config_of(folder), open_folder(folder)
    manifest = scan(source, config.data, seed=0)
    path = folder / "test/a/16.tif"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(tf.errors.InvalidArgumentError, match="Pillow cannot decode the image"):
        batches(evaluation_stream(manifest, source, config, manifest.indices("test"), batch_size=8), 1)

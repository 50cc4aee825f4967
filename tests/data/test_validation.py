"""Every image is looked at before training, and all that is wrong with a data set is said at once."""

import hashlib
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config.data import DataConfig, SplitsConfig
from pipeline.data.manifest import Manifest, SkippedImage, describe_changes
from pipeline.data.sources.base import LabeledImage
from pipeline.data.sources.catalog import open_source
from pipeline.data.validation import Finding, ValidationReport, scan, validate
from pipeline.errors import DataError


def encoded(seed: int, kind: str = "JPEG", size: tuple[int, int] = (40, 48), orientation: int | None = None) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)
    options = {}
    if orientation is not None:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write(root: Path, files: dict[str, bytes]) -> DataConfig:
    for key, data in files.items():
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(data)
    return DataConfig(source="folder", path=root)


def look(config: DataConfig, **options) -> Manifest:
    return scan(open_source(config), config, seed=42, **options)


def two_classes(n: int = 10) -> dict[str, bytes]:
    return {f"{name}/{i:03}.jpg": encoded(100 * k + i) for k, name in enumerate(("cat", "dog")) for i in range(n)}


@pytest.fixture(scope="module")
def digits() -> Manifest:
    return look(DataConfig(source="digits"))


def test_a_row_says_what_the_file_is(tmp_path):
    files = {
        "cat/a.jpg": encoded(0, size=(30, 50)),
        "cat/b.png": encoded(1, "PNG"),
        "cat/c.jpg": encoded(2, orientation=6),
        "dog/d.webp": encoded(3, "WEBP"),
        "dog/e.gif": encoded(4, "GIF"),
        "dog/f.bmp": encoded(5, "BMP"),
        "dog/g.jpg": encoded(6, orientation=99),
    }
    manifest = look(write(tmp_path, files))
    table = manifest.table
    assert manifest.class_names == ("cat", "dog")
    assert table["key"].tolist() == list(files)
    assert table["label"].tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert table["sha256"].tolist() == [hashlib.sha256(data).hexdigest() for data in files.values()]
    assert (table["height"][0], table["width"][0]) == (30, 50)
    assert table["orientation"].tolist() == [1, 1, 6, 1, 1, 1, 1]
    assert [str(table[name].dtype) for name in ("label", "group", "height", "width", "orientation")] == [
        "int32",
        "int64",
        "int32",
        "int32",
        "uint8",
    ]


def test_digits_are_all_different_by_their_pixels(digits):
    assert digits.table["group"].nunique() == 1797
    assert digits.table["sha256"].nunique() == 1797
    assert digits.notes == ()


def test_all_bad_files_are_listed_at_once(tmp_path):
    jpeg = encoded(0, size=(200, 200))
    config = write(
        tmp_path,
        {
            **two_classes(3),
            "cat/cut.jpg": jpeg[: len(jpeg) * 2 // 3],
            "cat/cut.png": encoded(1, "PNG")[:-40],
            "cat/empty.jpg": b"",
            "dog/page.jpg": b"<html>not found</html>",
            "dog/scan.tiff": encoded(2, "TIFF")[:-40],
            "dog/phone.heic": b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(50),
        },
    )
    with pytest.raises(DataError) as caught:
        look(config)
    message = str(caught.value)
    assert message.startswith("6 of 12 images cannot be used:")
    for line in (
        "cat/cut.jpg: is a damaged JPEG: it is truncated",
        "cat/cut.png: is a damaged PNG: Invalid PNG data",
        "cat/empty.jpg: is empty",
        "dog/page.jpg: is not an image",
        "dog/scan.tiff: ",
        "dog/phone.heic: ",
        "convert (to JPEG or PNG)",
    ):
        assert line in message


def test_the_first_twenty_bad_files_are_named(tmp_path):
    config = write(tmp_path, {**two_classes(1), **{f"cat/bad{i:02}.jpg": b"x" for i in range(25)}})
    with pytest.raises(DataError, match=r"(?s)25 of 27 .*bad19.jpg: .*\n  and 5 more\n") as caught:
        look(config)
    assert "bad20" not in str(caught.value)


def png_of_zeros(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(12_000, 12_000), (60_000, 60_000)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch, width, height):
    monkeypatch.setattr("pipeline.data.inspection.decode_plain", lambda *_args, **_kwargs: pytest.fail("decoded"))
    config = write(tmp_path, {"cat/bomb.png": png_of_zeros(width, height), "dog/bomb.png": png_of_zeros(width, height)})
    with pytest.raises(
        DataError, match=r"cat/bomb.png: (has 12000 x 12000 pixels; at most 89 million|would decode to too many pixels)"
    ):
        look(config)


def test_one_class_is_refused(tmp_path):
    with pytest.raises(DataError, match="All images are of one class, 'cat'"):
        look(write(tmp_path, {"cat/a.jpg": encoded(0)}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ("train/cat/a.jpg", "train/dog/b.jpg", "test/emu/c.jpg"),
            r"train lacks classes that other splits have:\n  emu \(in test\)",
        ),
        (("val/cat/a.jpg", "test/dog/b.jpg"), "none called train"),
    ],
)
def test_splits_that_cannot_be_trained_on_are_refused(tmp_path, keys, message):
    with pytest.raises(DataError, match=message):
        look(write(tmp_path, {key: encoded(i) for i, key in enumerate(keys)}))


def test_near_duplicates_stay_together_and_are_reported(tmp_path):
    files = two_classes(20)
    for i in range(8):
        files[f"cat/copy{i}.png"] = encoded(i, "PNG")
    files["dog/copy.png"] = encoded(9, "PNG")  # the same image as cat/009.jpg
    config = write(tmp_path, files)
    manifest = look(config)
    table = manifest.table.set_index("key")
    for i in range(8):
        assert table["split"][f"cat/copy{i}.png"] == table["split"][f"cat/{i:03}.jpg"]
        assert table["group"][f"cat/copy{i}.png"] == table["group"][f"cat/{i:03}.jpg"]
    assert manifest.notes == (
        "18 images are near-duplicates of another, in 9 groups: cat/000.jpg = cat/copy0.png; cat/001.jpg = "
        "cat/copy1.png; "
        "cat/002.jpg = cat/copy2.png and 6 more.",
        "2 near-duplicate images have different labels: cat/009.jpg (cat) = dog/copy.png (dog).",
    )
    apart = look(config.model_copy(update={"group_near_duplicates": False})).table
    assert apart["group"].nunique() == len(files)


@pytest.fixture
def leaking(tmp_path) -> DataConfig:
    files = {f"train/{name}/{i}.jpg": encoded(100 * k + i) for k, name in enumerate(("cat", "dog")) for i in range(10)}
    files |= {"test/cat/same.png": encoded(3, "PNG"), "test/dog/other.png": encoded(999, "PNG")}
    return write(tmp_path, files)


def test_leakage_between_given_splits_stops_a_run_and_names_the_pairs_and_the_remedy(leaking):
    with pytest.raises(DataError) as caught:
        look(leaking)
    message = str(caught.value)
    assert message.startswith("2 near-duplicate images are in more than one of the data set's own splits:\n")
    assert "  test/cat/same.png (test) = train/cat/3.jpg (" in message
    assert "data.on_leak=warn" in message


def test_leakage_that_is_accepted_is_reported_and_not_moved(leaking):
    manifest = look(leaking.model_copy(update={"on_leak": "warn"}))
    table = manifest.table.set_index("key")
    assert table["split"]["test/cat/same.png"] == "test"
    assert table["split"]["train/cat/3.jpg"] in ("train", "val")
    assert any(
        note.startswith("2 near-duplicate images are in more than one of the data set's own splits")
        and "test/cat/same.png (test)" in note
        for note in manifest.notes
    )
    ignoring = look(leaking.model_copy(update={"on_leak": "ignore"}))
    assert ignoring.table.equals(manifest.table)
    assert not any("more than one of" in note for note in ignoring.notes)


def test_classes_too_small_for_all_splits_are_reported(tmp_path):
    manifest = look(write(tmp_path, {**two_classes(5), "emu/a.jpg": encoded(7777), "emu/b.jpg": encoded(8888)}))
    assert manifest.class_counts().loc["emu"].tolist() == [1, 0, 1]
    assert manifest.notes == ("1 class has no image in val: emu.",)


def test_progress_counts_every_image(tmp_path):
    calls = []
    look(write(tmp_path, two_classes(3)), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 6) for i in range(1, 7)]


def test_names_play_no_part_in_the_splits(tmp_path):
    a, b = two_classes(), {key.replace("/0", "/other0"): data for key, data in reversed(two_classes().items())}
    split_of = [
        dict(zip(m.table["sha256"], m.table["split"], strict=True))
        for m in (look(write(tmp_path / "a", a)), look(write(tmp_path / "b", b)))
    ]
    assert split_of[0] == split_of[1]


def test_the_digest_changes_with_a_file(tmp_path):
    config = write(tmp_path, two_classes(3))
    before = look(config).digest()
    assert look(config).digest() == before
    path = tmp_path / "cat/000.jpg"
    path.write_bytes(path.read_bytes() + b"\0")
    assert look(config).digest() != before


def test_bad_files_are_left_out_on_request_and_nothing_is_changed(tmp_path):
    jpeg = encoded(0, size=(200, 200))
    good = two_classes(10)
    bad = {"cat/cut.jpg": jpeg[: len(jpeg) // 2], "dog/000a.jpg": b"", "dog/zz.png": b"<html>"}
    config = write(tmp_path, good | bad)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()}
    manifest = look(config.model_copy(update={"on_bad_image": "skip"}))
    assert manifest.table["key"].tolist() == sorted(good)
    assert [key for key, _ in manifest.skipped_images] == sorted(bad)
    assert dict(manifest.skipped_images)["dog/000a.jpg"] == "is empty"
    assert {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()
    } == before
    with pytest.raises(DataError, match=r"(?s)3 of 23 images cannot be used.*data\.on_bad_image=skip"):
        look(config)
    for path in bad:
        (tmp_path / path).unlink()
    assert look(config).digest() == manifest.digest()


@pytest.mark.parametrize("suffix", ["", "train/"])
def test_a_class_that_loses_all_of_its_images_is_refused(tmp_path, suffix):
    files = {f"{suffix}{key}": data for key, data in two_classes(3).items()} | {
        f"{suffix}emu/a.jpg": b"",
        f"{suffix}emu/b.jpg": b"x",
    }
    if suffix:
        files["test/cat/z.jpg"] = encoded(5555)
    config = write(tmp_path, files).model_copy(update={"on_bad_image": "skip"})
    with pytest.raises(DataError, match=r"1 class has no image that can be used:\n  emu"):
        look(config)


class Labels:
    """Four images in memory, one of which has a label that no class has."""

    class_names = ("cat", "dog")

    def list_images(self) -> list[LabeledImage]:
        return [LabeledImage(str(i), label, None) for i, label in enumerate((0, 1, -1, 1))]

    def stat(self, key: str) -> None:
        return None

    def read(self, key: str) -> bytes:
        return encoded(int(key))


def test_labels_that_no_class_has_are_bad(monkeypatch):
    config = DataConfig(source="digits")
    with pytest.raises(DataError, match=r"1 of 4 images cannot be used:\n  2: has the label -1; valid are 0 to 1"):
        scan(Labels(), config, seed=0)
    assert scan(Labels(), config.model_copy(update={"on_bad_image": "skip"}), seed=0).table["key"].tolist() == [
        "0",
        "1",
        "3",
    ]


def kinds(report: ValidationReport) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = {}
    for finding in report.findings:
        found.setdefault(finding.kind, []).append(finding)
    return found


def test_one_examination_finds_everything_at_once(leaking, tmp_path):
    def png(mode: str, seed: int) -> bytes:
        file = io.BytesIO()
        image = Image.open(io.BytesIO(encoded(seed))).convert(mode)
        if mode == "RGBA":
            image.putpixel((0, 0), (0, 0, 0, 0))
        image.save(file, "PNG")
        return file.getvalue()

    write(
        tmp_path,
        {
            "train/dog/empty.jpg": b"",
            "train/dog/copy.jpg": encoded(100),
            "train/dog/long.jpg": encoded(500, size=(20, 200)),
            "train/dog/turned.jpg": encoded(501, orientation=6),
            "train/dog/gray.png": png("L", 502),
            "train/cat/clear.png": png("RGBA", 503),
            "train/cat/table.png": png("P", 504),
            "test/emu/a.jpg": encoded(505),
            "train/emu/b.jpg": encoded(506),
        },
    )
    report = validate(open_source(leaking), leaking, seed=42)
    found = kinds(report)
    assert [finding.kind for finding in report.errors] == ["bad_files", "leaks"]
    assert found["bad_files"][0].items == ("train/dog/empty.jpg: is empty",)
    assert report.skipped_images == (SkippedImage("train/dog/empty.jpg", "is empty"),)
    assert found["identical_files"][0].items == ("train/dog/0.jpg = train/dog/copy.jpg",)
    assert found["aspects"][0].items == ("train/dog/long.jpg (20 x 200)",)
    assert {item for finding in found["traits"] for item in finding.items} == {
        *("train/dog/turned.jpg", "train/dog/gray.png", "train/cat/clear.png", "train/cat/table.png")
    }
    assert found["formats"][0].text == "25 JPEG, 5 PNG"
    assert report.manifest is not None
    assert len(report.manifest.table) == 30
    with pytest.raises(DataError, match=r"(?s)1 of 31 images cannot be used.*more than one of the data"):
        scan(open_source(leaking), leaking, seed=42)


def test_classes_with_a_single_image_are_named(tmp_path):
    manifest = look(write(tmp_path, {**two_classes(5), "emu/a.jpg": encoded(7777)}))
    assert "1 class has a single image: emu." in manifest.notes


def test_what_has_changed_since_a_scan_is_named(tmp_path):
    config = write(tmp_path, two_classes(3))
    before = look(config)

    def found() -> list[str]:
        return [line.strip() for line in describe_changes(before, look(config)).splitlines()]

    assert found() == []
    changed, rewritten = tmp_path / "cat/001.jpg", tmp_path / "cat/002.jpg"
    then = changed.stat().st_mtime - 1e6
    changed.write_bytes(encoded(900))
    os.utime(changed, (then, then))  # as cp -p and rsync -a do
    rewritten.write_bytes(rewritten.read_bytes())
    assert "cat/001.jpg: has other contents" in found()
    assert not [line for line in found() if line.startswith("cat/002.jpg: has other contents")], (
        "written again as it was, it is the same"
    )
    (tmp_path / "cat/000.jpg").rename(tmp_path / "dog/other.jpg")
    assert {"dog/other.jpg: is new", "cat/000.jpg: is gone"} <= set(found())
    (tmp_path / "dog").rename(tmp_path / "ant")
    assert "classes: were cat, dog; are ant, cat" in found()


def test_other_splits_and_another_order_are_changes(tmp_path):
    config = write(tmp_path, two_classes(10))
    before = look(config)
    said = describe_changes(
        before, look(config.model_copy(update={"splits": SplitsConfig(train=0.5, val=0.2, test=0.3)}))
    )
    assert "is in another split" in said
    turned = Manifest(before.class_names, before.table.iloc[::-1].reset_index(drop=True))
    assert describe_changes(before, turned).strip() == "the images come in another order"


def frames(name: str, count: int) -> dict[str, bytes]:
    """Files of one scene with noise, as the frames of a video: near-duplicates of each other."""
    scene = np.random.default_rng(len(name)).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    large = np.asarray(Image.fromarray(scene).resize((96, 64), Image.Resampling.BICUBIC)).astype(int)
    files = {}
    for number in range(count):
        noisy = large + np.random.default_rng(number).integers(-3, 4, large.shape)
        file = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "PNG")
        files[f"{name}/{number:03}.png"] = file.getvalue()
    return files


def test_classes_that_near_duplicates_keep_out_of_the_test_split_stop_a_run_that_could_measure_nothing(tmp_path):
    config = write(tmp_path, {**frames("walk", 12), **frames("running", 12)})
    with pytest.raises(DataError, match=r"(?s)2 classes have no image in test, .*walk \(12 images\).*group_near_dup"):
        look(config)
    assert look(config.model_copy(update={"group_near_duplicates": False})).class_counts()["test"].min() > 0


def test_a_class_that_near_duplicates_keep_out_of_the_test_split_is_named_where_others_are_measured(tmp_path):
    manifest = look(write(tmp_path, {**two_classes(10), **frames("walk", 12)}))
    [note] = [note for note in manifest.notes if "near-duplicates of each other" in note]
    assert note.startswith("1 class has no image in test")
    assert "walk (12 images)" in note
    assert "data.group_near_duplicates=false" in note


@pytest.mark.parametrize("names", [("Rose", "rose"), ("caf\u00e9", "cafe\u0301"), ("1", "1.0"), ("red oak", "red_oak")])
def test_class_names_that_a_reader_takes_for_the_same_are_named(tmp_path, names):
    files = {f"{name}/{i}.jpg": encoded(100 * k + i) for k, name in enumerate((*names, "other")) for i in range(5)}
    [note] = [note for note in look(write(tmp_path, files)).notes if "only in case" in note]
    assert " = ".join(map(repr, sorted(names))) in note


@pytest.mark.parametrize(("factor", "is_dark"), [(1, True), (16, True), (257, False)])
def test_images_of_16_bits_that_use_few_of_them_are_named(tmp_path, factor, is_dark):
    def high_bit_depth(seed: int) -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (64, 64)).astype(np.uint16) * factor
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    files = {f"{name}/{i}.png": high_bit_depth(10 * k + i) for k, name in enumerate("ab") for i in range(5)}
    report = validate(open_source(config := write(tmp_path, files)), config, seed=0)
    assert any(finding.kind == "dark" for finding in report.findings) == is_dark


def test_a_large_group_of_duplicates_is_named_by_three_of_them(tmp_path):
    blank = encoded(7777, "PNG")
    files = {**two_classes(10), **{f"cat/blank{i:04}.png": blank for i in range(300)}}
    manifest = look(write(tmp_path, files))
    assert max(map(len, manifest.notes)) < 400
    assert any("cat/blank0002.png and 297 more" in note for note in manifest.notes)


def test_files_that_are_no_images_by_their_suffix_are_counted(tmp_path):
    config = write(tmp_path, two_classes())
    assert not any("suffix" in note for note in look(config).notes)
    for name in ("cat/notes.txt", "cat/deep/more.txt", "dog/photo", "dog/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no image")
    assert "3 files are no image by the suffix: 2 .txt; 1 without." in look(config).notes

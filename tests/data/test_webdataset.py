"""Tar shards of webdataset are packed with the labels and splits that they have, or refused with shard and key."""

import io
import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from fake_console import FakeConsole
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.cli.pack import main
from pipeline.data.input_files import expand_braces
from pipeline.data.sources.pack import PackSource, open_pack
from pipeline.data.webdataset import WebDatasetInput
from pipeline.errors import DataError

Members = Mapping[str, bytes | str]


def jpeg(seed: int) -> bytes:
    coarse, file = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8), io.BytesIO()
    Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


def write(path: Path, samples: Sequence[tuple[str, Members]], mode: str = "w") -> Path:
    """Samples by key, their members by extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for key, members in samples:
            for extension, content in members.items():
                data = content.encode() if isinstance(content, str) else content
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def shards(folder: Path, label: str = "cls") -> Path:
    """Two shards of train and one of validation, of four samples each, whose labels alternate."""
    for number, name in enumerate(("train-000000", "train-000001", "validation-000000")):
        samples = [(f"{i:06}", {"jpg": jpeg(i), label: str(i % 2)}) for i in range(4 * number, 4 * number + 4)]
        write(folder / f"{name}.tar", samples)
    return folder


def run(*words: str | Path) -> str:
    console = FakeConsole()
    assert main(console, [str(word) for word in words]) == 0
    return console.output


def pack(out: Path, *words: str | Path) -> PackSource:
    run("--webdataset", *words, "--out", out)
    return open_pack(out)


def test_a_folder_of_shards_is_packed_in_order_with_the_splits_that_their_names_say(tmp_path: Path) -> None:
    source = pack(tmp_path / "pack", shards(tmp_path / "shards"))
    assert source.class_names == ("0", "1")
    images = source.list_images()
    assert images[0] == ("train/train-000000.tar/0/000000.jpg", 0, "train")
    assert images[5] == ("train/train-000001.tar/1/000005.jpg", 1, "train")
    assert [image.split for image in images] == ["train"] * 8 + ["val"] * 4
    assert [source.read(image.key) for image in images] == [jpeg(i) for i in range(12)]


def test_braces_name_the_shards_and_a_split_may_be_given(tmp_path: Path) -> None:
    folder = shards(tmp_path / "shards")
    words = [f"test={folder}/train-{{000000..000001}}.tar", f"train={folder}/validation-*.tar"]
    source = pack(tmp_path / "pack", *words)
    assert [image.split for image in source.list_images()] == ["test"] * 8 + ["train"] * 4


@given(st.integers(0, 200), st.integers(0, 30), st.integers(1, 6))
def test_a_range_in_braces_has_all_numbers_with_their_digits(first: int, more: int, digits: int) -> None:
    names = expand_braces(f"a-{{{first:0{digits}}..{first + more}}}-b{{.tar,.tgz}}")
    assert names[::2] == [f"a-{number:0{digits}}-b.tar" for number in range(first, first + more + 1)]
    assert len(names) == 2 * (more + 1)


def test_folders_may_name_the_splits(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write(tmp_path / "shards" / split / "00.tar", [("a", {"png": jpeg(0), "txt": "rose"})])
    images = pack(tmp_path / "pack", tmp_path / "shards").list_images()
    assert [image.key for image in images] == ["train/00.tar/0/a.png", "val/00.tar/0/a.png"]


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        ([{"txt": "rose\n"}, {"txt": "aster"}], ("aster", "rose"), [1, 0]),
        ([{"cls": "10"}, {"cls": " 9\n"}], ("9", "10"), [1, 0]),
        ([{"cls": "1", "txt": "a rose by the sea"}, {"cls": "1.0", "txt": "a rose"}], ("1",), [0, 0]),
        ([{"json": json.dumps({"label": 3})}, {"json": json.dumps({"label": 20})}], ("3", "20"), [0, 1]),
        ([{"json": json.dumps({"label": "b"}), "npy": "x"}, {"json": json.dumps({"label": "a"})}], ("a", "b"), [1, 0]),
        ([{"json": json.dumps({"width": 3}), "txt": "b"}, {"json": "{}", "txt": "a"}], ("a", "b"), [1, 0]),
    ],
)
def test_labels_are_those_of_cls_json_or_txt(
    tmp_path: Path, labels: list[dict], names: tuple[str, ...], expected: list[int]
) -> None:
    samples = [(f"{i}", {"jpg": jpeg(i)} | members) for i, members in enumerate(labels)]
    source = pack(tmp_path / "pack", write(tmp_path / "a.tar", samples))
    assert source.class_names == names
    assert [image.label for image in source.list_images()] == expected


def test_numbers_are_called_by_a_list_of_classes_or_by_a_field_of_json(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("tulip\nrose\n")
    source = pack(tmp_path / "pack", shards(tmp_path / "shards"), "--classes", tmp_path / "names.txt")
    assert source.class_names == ("tulip", "rose")
    rows = [{"y": 1, "species": "tulip"}, {"y": 2, "species": "rose"}]
    samples = [(f"{i}", {"jpg": jpeg(i), "json": json.dumps(row)}) for i, row in enumerate(rows)]
    words = ["--label-feature", "y", "--class-feature", "species", "--first-label", "1"]
    source = pack(tmp_path / "second", write(tmp_path / "a.tar", samples), *words)
    assert source.class_names == ("tulip", "rose")
    (tmp_path / "names.txt").write_text("tulip\n")
    with pytest.raises(DataError, match=r"train-000000.tar: sample 000001 has the label 1; valid are 0 to 0; do they"):
        pack(tmp_path / "third", tmp_path / "shards", "--classes", tmp_path / "names.txt")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"jpg": jpeg(0)}, "has no label; it has jpg, and needs cls, json with the field label, or txt"),
        ({"jpg": jpeg(0), "json": '{"class": 1}'}, "has no label; it has jpg, json"),
        ({"jpg": jpeg(0), "cls": ""}, "has no label; it has jpg, cls"),
        ({"jpg": jpeg(0), "json": "{"}, "has a file that cannot be read: Expecting property name"),
        ({"jpg": jpeg(0), "json": '{"label": [1, 2]}'}, "label in its json is no text and no number: [1, 2]"),
        ({"jpg": jpeg(0), "cls": b"\xff"}, "has a file that cannot be read: 'utf-8' codec"),
        ({"cls": "1", "mp4": "x"}, "has no image; it has cls, mp4"),
        ({"jpg": b"", "cls": "1"}, "has no image jpg; it has jpg, cls"),
        ({"jpg": jpeg(0), "png": jpeg(0), "cls": "1"}, "has several images; it has jpg, png, cls; --image-feature"),
    ],
)
def test_a_sample_that_cannot_be_used_is_named_with_its_shard(tmp_path: Path, members: Members, message: str) -> None:
    samples = [("000000", {"jpg": jpeg(1), "cls": "0"}), ("photos/000001", members)]
    path = write(tmp_path / "train-0.tar", samples)
    with pytest.raises(
        DataError, match=re.escape(f"{path}: sample photos/000001 {message}".replace("001 label", "001: label"))
    ):
        pack(tmp_path / "pack", path)


def test_one_of_several_images_is_chosen_by_its_extension(tmp_path: Path) -> None:
    sample = {"jpg": jpeg(0), "depth.png": jpeg(1), "png": jpeg(2), "cls": "1"}
    source = pack(tmp_path / "pack", write(tmp_path / "a.tar", [("0", sample)]), "--image-feature", "png")
    assert source.read("a.tar/0/0.png") == jpeg(2)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@settings(deadline=None, max_examples=40)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_shard_that_is_cut_short_anywhere_is_refused(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, share: float
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    samples = [(f"{i}", {"jpg": jpeg(i), "cls": str(i % 2)}) for i in range(3)]
    path = write(folder / f"a{suffix}", samples, "w:gz" if suffix == ".tar.gz" else "w")
    with tarfile.open(path) as tar:
        end = max(member.offset_data + -(-member.size // 512) * 512 for member in tar) + 512  # with a block of zeros
    length = path.stat().st_size if suffix == ".tar.gz" else end
    content = path.read_bytes()
    path.write_bytes(content[: int(share * length)])
    with pytest.raises(DataError, match=r"a\.tar.* is damaged at or after (its first sample|sample \d)"):
        pack(folder / "pack", path)


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", [(f"{i}", {"jpg": jpeg(i), "cls": "1"}) for i in range(3)])
    with tarfile.open(path) as tar:
        offset = tar.getmember("1.jpg").offset
    content = bytearray(path.read_bytes())
    content[offset + 150] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a.tar is damaged at or after sample 0: invalid header, at byte"):
        pack(tmp_path / "pack", path)


def test_a_second_archive_in_one_file_is_not_left_out_silently(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, [(name, {"jpg": jpeg(0), "cls": "1"})]) for name in ("a.tar", "b.tar"))
    first.write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(DataError, match=r"a.tar is damaged at or after sample a: more follows its end marker"):
        pack(tmp_path / "pack", first)


def test_packing_goes_on_in_the_middle_of_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--webdataset", shards(tmp_path / "shards"), "--out", tmp_path / "pack", "--shard-images", "3"]
    shard = tmp_path / "shards/train-000001.tar"
    read = WebDatasetInput._to_record

    def fail(self, file, sample):
        if sample.key == "000006":
            raise DataError("the network is down")
        return read(self, file, sample)

    with monkeypatch.context() as patch:
        patch.setattr(WebDatasetInput, "_to_record", fail)
        with pytest.raises(DataError, match="the network is down"):
            run(*words)
    assert "written  6 images" in run(*words)
    assert [open_pack(tmp_path / "pack").read(i.key) for i in open_pack(tmp_path / "pack").list_images()] == [
        jpeg(i) for i in range(12)
    ]
    write(shard, [("0", {"jpg": jpeg(0), "cls": "1"})])
    with pytest.raises(DataError, match=r"train/train-000001.tar: was \d+ bytes, changed at"):
        run(*words)

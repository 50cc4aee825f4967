"""Packs hold what was packed, are gone on with, and notice what has changed."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from fake_console import FakeConsole
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.cli import check
from pipeline.cli.pack import main
from pipeline.config.data import DataConfig
from pipeline.config.schema import Config
from pipeline.data import packing
from pipeline.data.input_pipeline import training_stream
from pipeline.data.inspection import inspect_all
from pipeline.data.pack_inputs import SourceInput
from pipeline.data.packing import ShardLimit, pack
from pipeline.data.scan_cache import ScanCache
from pipeline.data.sources import pack as pack_module
from pipeline.data.sources.base import DataSource, FileStat, LabeledImage
from pipeline.data.sources.catalog import open_source
from pipeline.data.sources.files import FileSource
from pipeline.data.sources.folder import open_folder
from pipeline.data.sources.pack import PackSource, open_pack
from pipeline.data.validation import scan
from pipeline.errors import DataError
from pipeline.files import temporary_name

PROJECT = Path(__file__).parents[2]


def encoded(seed: int, kind: str = "JPEG") -> bytes:
    coarse, file = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8), io.BytesIO()
    Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


def fill(root: Path, count: int = 12, prefix: str = "") -> Path:
    """Two classes of images, JPEG and PNG."""
    for number in range(count):
        name = ("cat", "dog")[number % 2]
        path = root / prefix / name / f"{number:02}.{'png' if number % 5 == 0 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number + 1000 * len(prefix), "PNG" if number % 5 == 0 else "JPEG"))
    return root


def make(source: DataSource, folder: Path, shard_images: int | None = 5) -> packing.PackResult:
    return pack(SourceInput(source), folder, ShardLimit(float("inf"), shard_images), lambda done, of: None)


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return fill(tmp_path / "images")


@pytest.fixture
def config(images: Path) -> Path:
    path = images.parent / "config.yaml"
    path.write_text(f"data: {{source: folder, path: {images}}}\n")
    return path


def run(*words: str | Path) -> tuple[int, str]:
    console = FakeConsole()
    return main(console, [str(word) for word in words]), console.output


def flip(path: Path, needle: bytes) -> None:
    """One bit of the middle of what is found in a file."""
    content = bytearray(path.read_bytes())
    content[content.index(needle) + len(needle) // 2] ^= 1
    path.write_bytes(content)


class InMemory:
    """Images that are no files, and what was read of them."""

    def __init__(self, contents: list[bytes], splits: list[str | None] | None = None) -> None:
        self.class_names = ("even", "odd")
        self.contents, self.splits = contents, splits or [None] * len(contents)
        self.read_keys: list[str] = []

    def list_images(self) -> list[LabeledImage]:
        return [LabeledImage(f"ä/{i}", i % 2, split) for i, split in enumerate(self.splits)]

    def stat(self, key: str) -> None:
        return None

    def read(self, key: str) -> bytes:
        self.read_keys.append(key)
        return self.contents[int(key[2:])]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.binary(max_size=200_000) | st.binary(max_size=3), min_size=1, max_size=12),
    st.sampled_from(
        [
            ShardLimit(1.0),
            ShardLimit(100.0),
            ShardLimit(1e5),
            ShardLimit(float("inf")),
            ShardLimit(float("inf"), 1),
            ShardLimit(float("inf"), 4),
        ]
    ),
    st.booleans(),
)
def test_every_byte_comes_back_whatever_the_files_and_the_shards(
    tmp_path_factory: pytest.TempPathFactory, contents: list[bytes], limit: ShardLimit, split: bool
) -> None:
    folder = tmp_path_factory.mktemp("pack")
    source = InMemory(contents, ["train", "val", "test"] * len(contents) if split else None)
    source.splits = source.splits[: len(contents)]
    pack(SourceInput(source), folder, limit, lambda done, of: None)
    packed = open_pack(folder)
    assert packed.list_images() == source.list_images()
    assert packed.class_names == source.class_names
    assert [packed.read(sample.key) for sample in reversed(packed.list_images())] == contents[::-1]


def test_a_pack_is_the_files_in_shards_with_an_index(images: Path, tmp_path: Path) -> None:
    source = open_folder(images)
    make(source, tmp_path / "pack")
    shards = [f"pack-{i:05}-of-00003.array_record" for i in range(3)]
    assert sorted(path.name for path in (tmp_path / "pack").iterdir()) == ["index.parquet", *shards, "pack.json"]
    index = pq.read_table(tmp_path / "pack/index.parquet").to_pylist()
    assert [row["key"] for row in index] == [sample.key for sample in source.list_images()]
    assert [(row["shard"], row["position"]) for row in index] == [(i // 5, i % 5) for i in range(12)]
    packed = open_pack(tmp_path / "pack")
    keys = [sample.key for sample in packed.list_images()]
    assert keys == [sample.key for sample in source.list_images()]
    read = tf.data.Dataset.from_tensor_slices(keys).map(packed.read_tf, num_parallel_calls=2)
    assert read.element_spec == tf.TensorSpec((), tf.string)
    assert list(read.as_numpy_iterator()) == [source.read(key) for key in keys]
    assert packed.stat(keys[3]).size == len(source.read(keys[3]))
    with pytest.raises(DataError, match="holds no image cat/none"):
        packed.read("cat/none.jpg")


@pytest.mark.parametrize(
    "given", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["splits made", "splits given"]
)
def test_training_from_a_pack_sees_the_same_as_from_the_files(tmp_path: Path, given: bool) -> None:
    images = tmp_path / "images"
    for prefix in ("train", "test") if given else ("",):
        fill(images, 20, prefix)
    make(open_folder(images), tmp_path / "pack", 7)
    batches, manifests = [], []
    for source, path in (("folder", images), ("pack", tmp_path / "pack")):
        values: dict[str, Any] = {
            "seed": 3,
            "model": {"variant": "b0", "weights": None, "resolution": 32},
            "data": {"source": source, "path": str(path)},
            "augment": {"transforms": ["RandomResizedCrop", "HorizontalFlip"]},
            "train": {"global_batch_size": 4},
        }
        config = Config.model_validate(values)
        opened = open_source(config.data)
        manifests.append(scan(opened, config.data, seed=config.seed))
        batches.append(
            list(
                training_stream(manifests[-1], opened, config, config.train.global_batch_size, start_step=2)
                .take(6)
                .as_numpy_iterator()
            )
        )
    assert manifests[0].digest() == manifests[1].digest()
    assert manifests[0].table.equals(manifests[1].table)
    for one, other in zip(*batches, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_starting_at_a_step_reads_nothing_of_what_lies_before(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(open_folder(images), tmp_path / "pack")
    config = Config.model_validate(
        {
            "model": {"variant": "b0", "weights": None, "resolution": 32},
            "data": {
                "source": "pack",
                "path": str(tmp_path / "pack"),
                "splits": {"train": 0.5, "val": 0.25, "test": 0.25},
            },
            "train": {"global_batch_size": 2},
            "runtime": {"num_workers": 1},
        }
    )
    source = open_source(config.data)
    assert isinstance(source, PackSource)
    manifest = scan(source, config.data, seed=0)
    read: list[str] = []
    whole = pack_module.read_record
    monkeypatch.setattr(
        pack_module, "read_record", lambda *arguments: [read.append(arguments[-1]), whole(*arguments)][1]
    )
    [(_, _, _, index)] = (
        training_stream(manifest, source, config, config.train.global_batch_size, start_step=1_000_001)
        .take(1)
        .as_numpy_iterator()
    )
    assert read[:2] == manifest.table["key"][index].tolist()
    assert len(read) < 20, "batches that wait ready"


def test_a_pack_that_was_cut_off_goes_on_with_the_shards_that_are_whole(images: Path, tmp_path: Path) -> None:
    class Halting(FileSource):
        def read(self, key: str) -> bytes:
            if key in stop_at:
                raise KeyboardInterrupt
            return super().read(key)

    source = open_folder(images)
    make(source, tmp_path / "whole", 3)
    folder = tmp_path / "pack"
    stop_at: list[str] = []
    for key in ("cat/08.jpg", "dog/07.jpg"):
        stop_at[:] = [key]
        with pytest.raises(KeyboardInterrupt):
            make(Halting(source.root, source.class_names, source.list_images()), folder, 3)
        assert [path.name for path in folder.iterdir()] == [".packing"], "nothing is seen that is not finished"
        with pytest.raises(DataError, match="holds no finished pack"):
            open_pack(folder)
    stop_at.clear()
    first = folder / ".packing/00000.array_record"
    before = first.stat().st_mtime_ns
    flip(folder / ".packing/00001.array_record", source.read("cat/06.jpg"))
    (folder / ".packing" / temporary_name("00003.parquet")).write_bytes(b"what a kill cuts short")
    packed = make(source, folder, 3)
    assert packed.written == 6, "the damaged shard and the one that was missing"
    assert (folder / "pack-00000-of-00004.array_record").stat().st_mtime_ns == before
    assert {name: content for name, (content, _) in files(folder).items()} == {
        n: c for n, (c, _) in files(tmp_path / "whole").items()
    }


@pytest.mark.parametrize("moved", range(7))
def test_a_pack_that_was_cut_off_while_it_got_its_names_is_finished(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    done: list[Path] = []
    replace = Path.replace

    def halting(path: Path, target: Path) -> Path:
        if path.parent.name == ".packing" and target.parent.name == "pack":
            if len(done) == moved:
                raise KeyboardInterrupt
            done.append(path)
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", halting)
        if moved < 6:
            with pytest.raises(KeyboardInterrupt):
                make(open_folder(images), tmp_path / "pack", 3)
        else:
            make(open_folder(images), tmp_path / "pack", 3)
    packed = make(open_folder(images), tmp_path / "pack", 3)
    assert packed.written == 0
    assert sorted(os.listdir(tmp_path / "pack")) == [  # noqa: PTH208 - hidden ones, too
        "index.parquet",
        *(f"pack-{i:05}-of-00004.array_record" for i in range(4)),
        "pack.json",
    ]
    assert len(open_pack(tmp_path / "pack").list_images()) == 12


@pytest.mark.slow
def test_a_kill_leaves_what_another_run_goes_on_from(tmp_path: Path) -> None:
    images = fill(tmp_path / "images", 200)
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "pack",
        "--config",
        str(tmp_path / "c.yaml"),
        "--out",
        str(tmp_path / "pack"),
    ]
    (tmp_path / "c.yaml").write_text(f"data: {{source: folder, path: {images}}}\n")
    process = subprocess.Popen([*command, "--shard-images", "1"], cwd=PROJECT, stdout=subprocess.DEVNULL)
    while not (tmp_path / "pack/.packing/00004.parquet").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = len(list((tmp_path / "pack/.packing").glob("[0-9]*.parquet")))  # not .new-*, which the kill cut short
    packed = make(open_folder(images), tmp_path / "pack", 1)
    assert 0 < packed.written == 200 - finished
    source = open_folder(images)
    opened = open_pack(tmp_path / "pack")
    assert [opened.read(sample.key) for sample in opened.list_images()] == [
        source.read(sample.key) for sample in source.list_images()
    ]


def test_a_finished_pack_is_reported_and_stays_as_it_is(config: Path, tmp_path: Path) -> None:
    code, output = run("--config", config, "--out", tmp_path / "pack", "--shard-images", "5")
    assert code == 0
    assert "12 images of 2 classes" in output
    assert "data.source=pack" in output
    before = files(tmp_path / "pack")
    for path in (config.parent / "images").rglob("*.jpg"):
        path.touch()
    code, output = run("--config", config, "--out", tmp_path / "pack")
    assert code == 0
    assert "the pack was complete, and is intact" in output
    assert files(tmp_path / "pack") == before
    assert run("--verify", tmp_path / "pack")[0] == 0


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("contents", "cat/00.png: has other contents"),
        ("gone", "cat/00.png: is gone"),
        ("label", "cat/00.png: is gone"),
        ("new", "number of images: was 12, is 13"),
    ],
)
def test_a_data_set_that_has_changed_is_refused(
    images: Path, tmp_path: Path, change: str, message: str, finished: bool
) -> None:
    packed = make(open_folder(images), tmp_path / "pack", 3)
    if not finished:  # as if it had been cut off in the third shard
        staging = tmp_path / "pack/.packing"
        staging.mkdir()
        packing.atomic_write(staging / packing.IDENTITY, json.dumps(packed.metadata.identity))
        for number, shard in enumerate(packed.metadata.shards):
            path = (tmp_path / "pack" / shard.name).rename(staging / f"{number:05}.array_record")
            rows = (
                packed.index.slice(3 * number, 3)
                .append_column("class_name", [[None] * 3])
                .select(packing.ROWS.names)
                .cast(packing.ROWS)
            )
            if number < 2:
                packing._mark_finished(packing._WrittenShard(path, rows, shard.sha256))
        (tmp_path / "pack/pack.json").unlink()
        (tmp_path / "pack/index.parquet").unlink()
    if change == "contents":
        flip(images / "cat/00.png", (images / "cat/00.png").read_bytes())
    elif change == "gone":
        (images / "cat/00.png").unlink()
    elif change == "label":
        (images / "cat/00.png").rename(images / "dog/00.png")
    else:
        (images / "dog/zz.png").write_bytes(encoded(77))
    before = files(tmp_path / "pack") if finished else files(tmp_path / "pack/.packing")
    with pytest.raises(
        DataError, match=rf"(?s)is of another data set, or of an earlier state of this one:\n.*{message}"
    ):
        make(open_folder(images), tmp_path / "pack", 3)
    after = files(tmp_path / "pack") if finished else files(tmp_path / "pack/.packing")
    assert {name: after[name] for name in before} == before


def test_a_flipped_bit_is_found_by_reading_by_verifying_and_mended(config: Path, tmp_path: Path) -> None:
    source = open_folder(config.parent / "images")
    make(source, tmp_path / "pack")
    shard = tmp_path / "pack/pack-00001-of-00003.array_record"
    content = shard.read_bytes()
    key = source.list_images()[6].key
    flip(shard, source.read(key))
    opened = open_pack(tmp_path / "pack")
    where = rf"{key} is damaged: record 1 of {shard}"
    with pytest.raises(DataError, match=where):
        opened.read(key)
    assert opened.read(source.list_images()[7].key) == source.read(source.list_images()[7].key)
    with pytest.raises(tf.errors.OpError, match=where):
        list(tf.data.Dataset.from_tensors(key).map(opened.read_tf).as_numpy_iterator())
    with pytest.raises(DataError, match=rf"(?s)1 file or record is damaged:\n  {where}"):
        run("--verify", tmp_path / "pack")
    with pytest.raises(DataError, match=rf"1 of 12 images cannot be used:\n  {key}: is damaged: record 1 of"):
        scan(opened, DataConfig(source="pack", path=tmp_path / "pack"), seed=0)
    code, output = run("--config", config, "--out", tmp_path / "pack")
    assert code == 0
    assert "written  5 images" in output
    assert shard.read_bytes() == content


@pytest.mark.parametrize("part", ["pack-00001-of-00003.array_record", "index.parquet", "pack.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "emptied", "flipped", "replaced"])
def test_no_damage_goes_unnoticed(images: Path, tmp_path: Path, part: str, damage: str) -> None:
    make(open_folder(images), tmp_path / "pack")
    path = tmp_path / "pack" / part
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 3] ^= 4
    new = {
        "cut": content[: len(content) // 2],
        "emptied": b"",
        "flipped": bytes(flipped),
        "replaced": b"x" * len(content),
    }.get(damage)
    path.unlink() if new is None else path.write_bytes(new)
    with pytest.raises(DataError, match=r"damaged|not the one|cannot be read|holds no finished pack|is of format"):
        run("--verify", tmp_path / "pack")
    assert path.exists() is (new is not None)
    if damage in ("missing", "cut", "emptied"):
        with pytest.raises(DataError, match=part):
            open_pack(tmp_path / "pack")


def test_shards_that_changed_places_are_found(images: Path, tmp_path: Path) -> None:
    source = open_folder(images)
    make(source, tmp_path / "pack", 6)
    first, second = sorted((tmp_path / "pack").glob("*.array_record"))
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    if first.stat().st_size == second.stat().st_size:
        with pytest.raises(DataError, match="has another SHA-256"):
            open_pack(tmp_path / "pack").read(source.list_images()[0].key)
    with pytest.raises(DataError, match="12 files or records are damaged"):
        run("--verify", tmp_path / "pack")


def test_nothing_of_anybody_else_is_overwritten(config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/pack-00000-of-00001.array_record").write_text("mine")
    for name in ("file", "full"):
        with pytest.raises(DataError, match=rf"{name} exists and is no pack, and nothing is overwritten"):
            run("--config", config, "--out", tmp_path / name)
    assert [path.read_text() for path in (tmp_path / "file", *(tmp_path / "full").iterdir())] == ["mine", "mine"]
    with pytest.raises(DataError, match="lies in the data set"):
        run("--config", config, "--out", config.parent / "images/pack")


def test_one_process_at_a_time_packs_into_a_folder(images: Path, tmp_path: Path) -> None:
    pack_input = SourceInput(open_folder(images))
    records = pack_input.records

    def again(start: int, last: str | None) -> Iterator[Any]:
        with pytest.raises(DataError, match="another process is packing into it"):
            make(open_folder(images), tmp_path / "pack")
        yield from records(start, last)

    pack_input.records = again  # type: ignore[method-assign]
    pack(pack_input, tmp_path / "pack", ShardLimit(1e9), lambda done, of: None)
    assert len(open_pack(tmp_path / "pack").list_images()) == 12


def test_a_disk_that_is_full_is_named_with_the_way_on(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def __init__(self, path: str, options: str) -> None:
            pass

        def write(self, data: bytes) -> None:
            raise RuntimeError("write() failed: No space left on device")

    monkeypatch.setattr(packing, "ArrayRecordWriter", Full)
    with pytest.raises(
        DataError, match=r"00000.array_record cannot be written: .*No space left.*it continues from here"
    ):
        make(open_folder(images), tmp_path / "pack")


def test_an_unreadable_image_is_named_and_what_is_written_stays(images: Path, tmp_path: Path) -> None:
    source = open_folder(images)
    (images / "dog/09.jpg").unlink()
    with pytest.raises(DataError, match=r"dog/09.jpg cannot be read: No such file"):
        make(source, tmp_path / "pack", 3)
    assert len(list((tmp_path / "pack/.packing").glob("*.parquet"))) == 3


def test_packing_reads_a_few_files_ahead_and_no_more(tmp_path: Path) -> None:
    source = InMemory([b"x" * 10] * 500)
    records = SourceInput(source).records(100, None)
    assert [next(records).key for _ in range(3)] == ["ä/100", "ä/101", "ä/102"]
    assert len(source.read_keys) <= 20
    records.close()  # type: ignore[attr-defined]


def test_few_shards_are_open_at_once(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_module, "OPEN_SHARDS", 2)
    make(open_folder(images), tmp_path / "pack", 1)
    opened = open_pack(tmp_path / "pack")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for sample in [*opened.list_images(), *opened.list_images()]:
        opened.read(sample.key)
    assert len(os.listdir("/proc/self/fd")) - before <= 2  # noqa: PTH208


def test_a_second_scan_reads_no_image(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(open_folder(images), tmp_path / "pack")
    source = open_pack(tmp_path / "pack")
    first, _ = inspect_all(source, source.list_images(), ScanCache(tmp_path / "pack"))
    monkeypatch.setattr(PackSource, "read", lambda self, key: pytest.fail(f"read {key}"))
    again, problems = inspect_all(source, source.list_images(), ScanCache(tmp_path / "pack"))
    assert not problems
    np.testing.assert_array_equal(again, first)
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "pack")
    (images / "cat/00.png").write_bytes(encoded(99, "PNG"))
    make(open_folder(images), tmp_path / "pack")
    source = open_pack(tmp_path / "pack")
    read: list[str] = []
    whole = PackSource.read
    monkeypatch.setattr(PackSource, "read", lambda self, key: [read.append(key), whole(self, key)][1])
    inspect_all(source, source.list_images(), ScanCache(tmp_path / "pack"))
    assert read == ["cat/00.png"], "the hash is another, so it is looked at again"


def test_the_check_works_on_a_pack(images: Path, tmp_path: Path) -> None:
    (images / "cat/cut.png").write_bytes(encoded(7, "PNG")[:-60])
    make(open_folder(images), tmp_path / "pack")
    (tmp_path / "pack.yaml").write_text(f"data: {{source: pack, path: {tmp_path / 'pack'}}}\n")
    console = FakeConsole()
    assert check.main(console, ["--config", str(tmp_path / "pack.yaml")]) == 2
    assert "cat/cut.png: is a damaged PNG" in console.output
    console = FakeConsole()
    assert check.main(console, ["--config", str(tmp_path / "pack.yaml"), "data.on_bad_image=skip"]) == 0
    assert "12 usable images" in console.output


def test_a_pack_can_be_packed_again_into_other_shards(images: Path, tmp_path: Path) -> None:
    make(open_folder(images), tmp_path / "pack", 5)
    make(open_pack(tmp_path / "pack"), tmp_path / "again", 2)
    first, second = open_pack(tmp_path / "pack"), open_pack(tmp_path / "again")
    assert first.list_images() == second.list_images()
    assert len(list((tmp_path / "again").glob("*.array_record"))) == 6
    assert all(first.read(sample.key) == second.read(sample.key) for sample in first.list_images())


def test_a_status_is_the_same_as_long_as_the_contents_are(images: Path, tmp_path: Path) -> None:
    make(open_folder(images), tmp_path / "one", 5)
    make(open_folder(images), tmp_path / "other", 2)
    one, other = open_pack(tmp_path / "one"), open_pack(tmp_path / "other")
    statuses = {one.stat(sample.key) for sample in one.list_images()}
    assert statuses == {other.stat(sample.key) for sample in other.list_images()}
    assert len(statuses) == 12
    assert all(isinstance(status, FileStat) and -(2**63) <= status.version < 2**63 for status in statuses)

"""Data sets of Hugging Face are read in place: from a folder, from files that the library wrote, and from the Hub."""

import hashlib
import io
import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import tensorflow as tf
from fake_console import FakeConsole
from PIL import Image

from pipeline.cli.pack import main as pack
from pipeline.config.data import DataConfig
from pipeline.config.loader import load_config
from pipeline.data.sources.base import DataSource
from pipeline.data.sources.catalog import open_source
from pipeline.data.validation import scan
from pipeline.errors import DataError

datasets = pytest.importorskip("datasets")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAMES = ["tulip", "rose"]  # not in alphabetical order


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def jpeg(seed: int) -> bytes:
    coarse, file = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8), io.BytesIO()
    Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


def table(n: int, first: int = 0, **columns: list) -> "datasets.Dataset":
    """n images whose labels alternate; their files' names are known."""
    images = [{"bytes": jpeg(first + i), "path": f"flower {first + i}.jpg"} for i in range(n)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    data = datasets.Dataset.from_dict({"image": images, "label": [i % 2 for i in range(n)]}, features)
    for name, values in columns.items():
        data = data.add_column(name, values)
    return data


def open_folder(path: Path, **keys: object) -> DataSource:
    return open_source(DataConfig(source="huggingface", path=path, **keys))


def graph_reads_the_same(source: DataSource) -> bool:
    keys = [image.key for image in source.list_images()]
    read = tf.data.Dataset.from_tensor_slices(keys).map(source.read_tf, num_parallel_calls=2)
    assert read.element_spec == tf.TensorSpec((), tf.string)
    return list(read.as_numpy_iterator()) == [source.read(key) for key in keys]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """What save_to_disk writes: train, validation, and a split that is not used."""
    splits = {"train": table(6), "validation": table(3, first=10), "extra": table(2, first=20)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def write_images(root: Path) -> None:
    for number, key in enumerate(("train/rose/a.jpg", "train/rose/b.jpg", "train/tulip/c.jpg", "test/tulip/d.jpg")):
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))


def test_a_saved_data_set_is_read_by_position_with_its_classes_splits_and_unchanged_bytes(saved: Path) -> None:
    source = open_folder(saved)
    assert source.class_names == ("tulip", "rose")
    images = source.list_images()
    assert images[1] == ("train/1/flower 1.jpg", 1, "train")
    assert [image.split for image in images] == ["train"] * 6 + ["val"] * 3
    assert source.read("validation/2/flower 12.jpg") == jpeg(12)
    assert graph_reads_the_same(source)


def test_a_data_set_without_splits_is_read(tmp_path: Path) -> None:
    table(4).save_to_disk(tmp_path / "saved")
    assert [image.split for image in open_folder(tmp_path / "saved").list_images()] == ["train"] * 4


def test_an_image_folder_is_read_from_its_files(tmp_path: Path) -> None:
    write_images(tmp_path)
    source = open_folder(tmp_path)
    assert source.class_names == ("rose", "tulip")
    images = {image.key: image for image in source.list_images()}
    assert set(images) == {"train/0/a.jpg", "train/1/b.jpg", "train/2/c.jpg", "test/0/d.jpg"}
    assert images["test/0/d.jpg"][1:] == (1, "test")
    assert source.read("test/0/d.jpg") == jpeg(3)
    assert graph_reads_the_same(source)


def test_parquet_files_are_read(tmp_path: Path) -> None:
    table(4).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    table(2, first=10).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    source = open_folder(tmp_path)
    assert source.class_names == ("tulip", "rose")
    assert source.read("test/1/flower 11.jpg") == jpeg(11)
    assert sorted({image.split for image in source.list_images()}) == ["test", "train"]


@pytest.mark.parametrize(
    ("values", "names", "labels"),
    [
        (["lily", "aster", "lily", "iris"], ("aster", "iris", "lily"), [2, 0, 2, 1]),
        ([10, 9, 10, None], ("9", "10"), [1, 0, 1, -1]),
    ],
)
def test_labels_may_be_texts_or_numbers(tmp_path: Path, values: list, names: tuple, labels: list) -> None:
    table(4, species=values).save_to_disk(tmp_path / "saved")
    source = open_folder(tmp_path / "saved", columns={"label": "species"})
    assert source.class_names == names
    assert [image.label for image in source.list_images()] == labels


def test_the_image_column_may_hold_plain_bytes(tmp_path: Path) -> None:
    files = [jpeg(i) for i in range(4)]
    datasets.Dataset.from_dict({"file": files, "label": ["a", "b"] * 2}).to_parquet(tmp_path / "train.parquet")
    source = open_folder(tmp_path, columns={"image": "file"})
    assert [source.read(image.key) for image in source.list_images()] == files
    assert source.list_images()[3] == ("train/3", 1, "train")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": "img"}, r"data.columns.image: the column 'img' does not exist; did you mean 'image'\?"),
        ({"image": "where"}, r"data.columns.image: the column 'where' holds no image files"),
        ({"label": "lable"}, r"data.columns.label: the column 'lable' does not exist; did you mean 'label'\?"),
        ({"label": "image"}, r"the column 'image' holds Image, not one label per image"),
    ],
)
def test_columns_that_cannot_be_used_are_named(tmp_path: Path, columns: dict, message: str) -> None:
    table(4, where=["here"] * 4).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=message):
        open_folder(tmp_path / "saved", columns=columns)


def test_of_several_columns_of_labels_none_is_guessed(tmp_path: Path) -> None:
    coarse = table(4).rename_column("label", "fine_label").add_column("coarse_label", [0, 0, 0, 1])
    coarse = coarse.cast_column("coarse_label", datasets.ClassLabel(names=["plant", "animal"]))
    coarse.save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"set data.columns.label to one of fine_label, coarse_label"):
        open_folder(tmp_path / "saved")
    assert open_folder(tmp_path / "saved", columns={"label": "coarse_label"}).class_names == ("plant", "animal")


def test_unsuitable_splits_and_folders_are_refused(tmp_path: Path) -> None:
    datasets.DatasetDict({"all": table(2)}).save_to_disk(tmp_path / "all")
    with pytest.raises(DataError, match=r"has only the splits all; needed is train"):
        open_folder(tmp_path / "all")
    splits = {name: table(2) for name in ("train", "val", "validation")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "twice")
    with pytest.raises(DataError, match=r"has one split under two names: train, val, validation"):
        open_folder(tmp_path / "twice")
    with pytest.raises(DataError, match=r"data.path: .*nowhere is missing; give a folder"):
        open_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"data.path: .*empty cannot be loaded: .*doesn't contain any data files"):
        open_folder(tmp_path / "empty")


def test_missing_and_damaged_images_are_named_before_training(tmp_path: Path) -> None:
    data = table(6)
    images = [*data.cast_column("image", datasets.Image(decode=False))["image"]]
    images[1], images[2] = None, {"bytes": b"no image", "path": None}
    datasets.Dataset.from_dict({"image": images, "label": data["label"]}, data.features).save_to_disk(
        tmp_path / "saved"
    )
    config = DataConfig(source="huggingface", path=tmp_path / "saved")
    with pytest.raises(DataError) as caught:
        scan(open_source(config), config, seed=0)
    assert "train/1: is empty: its row has no image" in str(caught.value)
    assert "train/2: is not an image" in str(caught.value)


def test_an_image_that_disappears_is_an_error_of_the_graph_without_a_traceback(tmp_path: Path) -> None:
    write_images(tmp_path)
    source = open_folder(tmp_path)
    (tmp_path / "train/rose/a.jpg").unlink()
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"train/0/a.jpg cannot be opened: No such file") as caught:
        list(tf.data.Dataset.from_tensors("train/0/a.jpg").map(source.read_tf))
    assert "Traceback" not in str(caught.value)


def test_the_state_of_an_image_changes_with_its_contents_and_only_then(tmp_path: Path, saved: Path) -> None:
    keys = [image.key for image in open_folder(saved).list_images()]
    before = [open_folder(saved).stat(key) for key in keys]
    assert [open_folder(saved).stat(key) for key in keys] == before
    assert before[0] is not None
    assert before[0].size == len(jpeg(0))
    datasets.DatasetDict({"train": table(6, first=30)}).save_to_disk(tmp_path / "saved")
    assert open_folder(saved).stat(keys[0]) != before[0]

    write_images(tmp_path / "images")
    first = open_folder(tmp_path / "images").stat("train/0/a.jpg")
    (tmp_path / "images/train/rose/a.jpg").write_bytes(jpeg(99))
    source = open_folder(tmp_path / "images")
    assert source.stat("train/0/a.jpg") != first
    assert source.read("train/0/a.jpg") == jpeg(99)


def test_a_pack_of_it_has_the_same_manifest(tmp_path: Path, saved: Path) -> None:
    config = DataConfig(source="huggingface", path=saved)
    (tmp_path / "config.yaml").write_text(f"data: {{source: huggingface, path: {saved}}}\n")
    console = FakeConsole()
    assert pack(console, ["--config", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "pack")]) == 0
    packed = DataConfig(source="pack", path=tmp_path / "pack")
    manifests = [scan(open_source(each), each, seed=0) for each in (config, packed)]
    assert manifests[0].digest() == manifests[1].digest()


def test_without_the_library_the_command_that_installs_it_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the package datasets.*pip install .*'\.\[huggingface\]'"):
        open_folder(tmp_path)


def test_a_folder_of_the_name_of_a_data_set_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beans").mkdir()
    with pytest.raises(DataError, match=r"give data.name=null data.path=beans"):
        open_source(DataConfig(source="huggingface", name="beans"))


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub that serves the files of one data set, owner/flowers."""

    root: Path

    def do_GET(self) -> None:
        parts = urlsplit(self.path).path.strip("/").split("/")
        if parts[:4] == ["api", "datasets", "owner", "flowers"]:
            self.answer_json(parts[4:])
        elif parts[:4] == ["datasets", "owner", "flowers", "resolve"]:
            self.answer_file(self.root.joinpath(*parts[5:]))
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET  # noqa: N815 - the name that the library calls

    def answer_json(self, parts: list[str]) -> None:
        content: object = {"id": "owner/flowers", "sha": COMMIT, "siblings": [], "private": False, "tags": []}
        if parts and parts[0] == "tree":
            content = [self.entry(path) for path in sorted(self.root.joinpath(*parts[2:]).iterdir())]
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def entry(self, path: Path) -> dict:
        kind, size = ("directory", 0) if path.is_dir() else ("file", path.stat().st_size)
        return {"type": kind, "path": path.relative_to(self.root).as_posix(), "size": size, "oid": "0" * 40}

    def answer_file(self, path: Path) -> None:
        if not path.is_file():
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        content = path.read_bytes()
        etag = hashlib.sha1(content).hexdigest()
        self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Be silent."""


CARD = """---
dataset_info:
  features:
  - {name: image, dtype: image}
  - {name: label, dtype: {class_label: {names: {'0': tulip, '1': rose}}}}
  splits:
  - {name: train, num_examples: 4, num_bytes: 4000}
---
"""
PROGRAM = """
import json, sys
from pipeline.config.data import DataConfig
from pipeline.config.loader import load_config
from pipeline.data.sources.catalog import open_source
from pipeline.errors import DataError
for keys in json.loads(sys.argv[1]):
    download = keys.pop("download", True)
    try:
        source = open_source(DataConfig(source="huggingface", **keys), download=download)
        print(len(source.list_images()), "images", *source.class_names)
    except DataError as error:
        print(type(error).__name__, *getattr(error, "class_names", ()), str(error).replace(chr(10), " "))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    Hub.root = tmp_path / "repository"
    (Hub.root / "data").mkdir(parents=True)
    (Hub.root / "README.md").write_text(CARD)
    table(4).to_parquet(Hub.root / "data/train-00000-of-00001.parquet")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def open_from_hub(home: Path, port: int, *keys: dict) -> list[str]:
    """The endpoint is read when the library is imported, hence a process of its own."""
    environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home)}
    words = [sys.executable, "-c", PROGRAM, json.dumps(keys)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.slow
def test_a_data_set_of_the_hub_is_downloaded_once_and_then_read_without_the_hub(
    tmp_path: Path, hub: ThreadingHTTPServer
) -> None:
    flowers = {"name": "owner/flowers"}
    known, loaded, pinned, config_name, absent = open_from_hub(
        tmp_path / "home",
        hub.server_port,
        flowers | {"download": False},
        flowers,
        flowers | {"revision": COMMIT},
        flowers | {"config_name": "small"},
        {"name": "owner/trees"},
    )
    assert known.startswith("DatasetNotDownloadedError tulip rose owner/flowers is not in ")
    assert loaded == pinned == "4 images tulip rose"
    assert "Available: ['default']; set data.config_name to one of them" in config_name
    assert absent.startswith("DataError data.name: the Hugging Face Hub has no data set 'owner/trees'")

    hub.shutdown()
    hub.server_close()
    loaded, pinned, other, absent = open_from_hub(
        tmp_path / "home",
        hub.server_port,
        flowers,
        flowers | {"revision": COMMIT},
        flowers | {"revision": "v2"},
        {"name": "owner/trees"},
    )
    assert loaded == pinned == "4 images tulip rose"
    assert f"is of commit {COMMIT}; set data.revision to that" in other
    assert "the Hugging Face Hub cannot be reached" in absent
    assert "data.name=null data.path=FOLDER" in absent


def test_the_printed_command_trains_from_the_pack_though_the_config_names_columns(tmp_path: Path, saved: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"data: {{source: huggingface, path: {saved}, columns: {{label: label}}}}\n")
    console = FakeConsole()
    assert pack(console, ["--config", str(config), "--out", str(tmp_path / "pack")]) == 0
    line = next(line for line in console.output.splitlines() if line.startswith("train"))
    words = shlex.split(line.partition("--config ")[2])
    assert words[0] == str(config)
    assert len(open_source(load_config(Path(words[0]), words[1:]).data).list_images()) == 9

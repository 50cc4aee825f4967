"""Packing reads CSV files, TFRecord files and tar shards at addresses; training is answered with the command."""

import functools
import io
import sys
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from fake_console import FakeConsole
from PIL import Image

from pipeline.cli.pack import main
from pipeline.config.data import DataConfig
from pipeline.config.loader import load_config
from pipeline.data import remote
from pipeline.data.sources.catalog import open_source
from pipeline.data.sources.pack import PackSource, open_pack
from pipeline.errors import ConfigError, DataError

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")


def jpeg(seed: int) -> bytes:
    coarse, file = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8), io.BytesIO()
    Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; the first requests for some paths fail."""

    failures: dict[str, int]

    def do_GET(self) -> None:
        path = self.path.lstrip("/")
        if self.failures.get(path, 0) > 0:
            self.failures[path] -= 1
            self.send_error(503)
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        """Be silent."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server on this machine that serves tmp_path/served."""
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(Handler, "failures", {}, raising=False)
    (tmp_path / "served").mkdir()
    handler = functools.partial(Handler, directory=tmp_path / "served")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def write_images(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(number))


def write_shard(path: Path, first: int) -> None:
    with tarfile.open(path, "w") as tar:
        for i in range(first, first + 4):
            for name, content in ((f"{i}.jpg", jpeg(i)), (f"{i}.cls", str(i % 2).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def run(*words: str | Path) -> str:
    console = FakeConsole()
    assert main(console, [str(word) for word in words]) == 0
    return console.output


def pack(out: Path, *words: str | Path) -> PackSource:
    run(*words, "--out", out)
    return open_pack(out)


def test_a_csv_file_and_its_images_are_packed_from_a_server(tmp_path: Path, server: str) -> None:
    write_images(tmp_path / "served/set", "roses/a b?.jpg", "tulips/ü.jpg", "c.jpg")
    write_images(tmp_path / "served", "d.jpg")
    rows = f"roses/a b?.jpg;rose\ntulips/ü.jpg;tulip\nc.jpg;rose\n../d.jpg;rose\n{server}/set/c.jpg?x=1;tulip\n"
    (tmp_path / "served/set/list.csv").write_text(f"file;species\n{rows}", encoding="utf-8-sig")
    words = ["--csv", f"{server}/set/list.csv", "--columns", "path=file", "label=species"]
    source = pack(tmp_path / "pack", *words)
    assert source.class_names == ("rose", "tulip")
    images = {image.key: image.label for image in source.list_images()}
    assert images == {
        "roses/a b?.jpg": 0,
        "tulips/ü.jpg": 1,
        "c.jpg": 0,
        "../d.jpg": 0,
        f"{server}/set/c.jpg?x=1": 1,
    }
    assert [source.read(key) for key in images] == [jpeg(0), jpeg(1), jpeg(2), jpeg(0), jpeg(2)]
    assert "is intact" in run(*words, "--out", tmp_path / "pack")


def test_a_local_csv_file_may_name_images_at_addresses_and_beside_it(tmp_path: Path, server: str) -> None:
    write_images(tmp_path / "served", "a.jpg", "b.jpg")
    write_images(tmp_path / "here", "c.jpg")
    (tmp_path / "here/list.csv").write_text(f"path,label\n{server}/b.jpg,x\nc.jpg,y\n")
    source = pack(tmp_path / "pack", "--csv", tmp_path / "here/list.csv")
    assert [source.read(image.key) for image in source.list_images()] == [jpeg(1), jpeg(0)]
    (tmp_path / "here/list.csv").write_text("path,label\na.jpg,x\nb.jpg,y\n")
    source = pack(tmp_path / "second", "--csv", tmp_path / "here/list.csv", "--root", server)
    assert [(image.key, source.read(image.key)) for image in source.list_images()] == [
        ("a.jpg", jpeg(0)),
        ("b.jpg", jpeg(1)),
    ]


def test_shards_at_addresses_are_packed_like_those_on_this_machine(tmp_path: Path, server: str) -> None:
    for number, name in enumerate(("train-0.tar", "train-1.tar", "val-0.tar")):
        write_shard(tmp_path / "served" / name, 4 * number)
    local = pack(tmp_path / "local", "--webdataset", tmp_path / "served")
    for number, word in enumerate((f"{server}/", f"{server}/*.tar", f"{server}/{{train-0,train-1,val-0}}.tar")):
        source = pack(tmp_path / f"pack{number}", "--webdataset", word)
        assert source.list_images() == local.list_images()
        assert [source.read(image.key) for image in source.list_images()] == [jpeg(i) for i in range(12)]


def test_packing_from_a_server_goes_on_in_the_middle_of_a_shard_and_notices_changes(
    tmp_path: Path, server: str
) -> None:
    for number, name in enumerate(("train-0.tar", "train-1.tar")):
        write_shard(tmp_path / "served" / name, 4 * number)
    words = ["--webdataset", f"{server}/train-{{0..1}}.tar", "--shard-images", "3", "--out", tmp_path / "pack"]
    Handler.failures["train-1.tar"] = remote.ATTEMPTS
    with pytest.raises(DataError, match=r"train-1.tar cannot be read: 503"):
        run(*words)
    assert "written  5 images" in run(*words)
    write_shard(tmp_path / "served/train-1.tar", 5)
    (tmp_path / "served/train-1.tar").touch()
    with (tmp_path / "served/train-1.tar").open("ab") as file:
        file.write(bytes(10240))
    with pytest.raises(DataError, match=r"train/train-1.tar: was \d+ bytes, Last-Modified .*, is \d+ bytes"):
        run(*words)


def test_tfrecord_files_at_addresses_are_packed(tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    for split, labels in (("train", (0, 1)), ("validation", (1, 0))):
        with tf.io.TFRecordWriter(str(tmp_path / "file")) as writer:
            for label in labels:
                features = {
                    "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[jpeg(label)])),
                    "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
                }
                writer.write(tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString())
        files.pipe_file(f"/bucket/{split}-00000", (tmp_path / "file").read_bytes())
    (tmp_path / "names.txt").write_text("tulip\nrose\n")
    words = ["train=memory://bucket/train-*", "validation=memory://bucket/validation-*"]
    source = pack(tmp_path / "pack", "--tfrecord", *words, "--classes", tmp_path / "names.txt")
    assert source.list_images() == [
        ("train/train-00000/0", 0, "train"),
        ("train/train-00000/1", 1, "train"),
        ("val/validation-00000/0", 1, "val"),
        ("val/validation-00000/1", 0, "val"),
    ]
    assert source.read("val/validation-00000/0") == jpeg(1)


def test_a_transfer_that_fails_is_tried_again_but_a_missing_file_is_not(tmp_path: Path, server: str) -> None:
    write_images(tmp_path / "served", "a.jpg")
    Handler.failures["a.jpg"] = remote.ATTEMPTS - 1
    assert remote.read(f"{server}/a.jpg") == jpeg(0)
    Handler.failures["a.jpg"] = remote.ATTEMPTS
    with pytest.raises(DataError, match=r"a.jpg cannot be read: 503"):
        remote.read(f"{server}/a.jpg")
    with pytest.raises(DataError, match=r"/b.jpg: there is no such file"):
        remote.read(f"{server}/b.jpg")


def test_an_image_that_is_missing_at_its_address_is_named(tmp_path: Path, server: str) -> None:
    (tmp_path / "served/list.csv").write_text("path,label\nnone.jpg,x\n")
    with pytest.raises(DataError, match=rf"{server}/none.jpg: there is no such file"):
        run("--csv", f"{server}/list.csv", "--out", tmp_path / "pack")


def test_packages_and_protocols_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"nothing://x/y is no address that fsspec knows: Protocol not known: nothing"):
        remote.read("nothing://x/y")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(DataError, match=r"s3://b/k: a package is missing: .*s3fs.* -m pip install"):
        remote.read("s3://b/k")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(DataError, match=r"a package is missing: .*pip install .*'\.\[remote\]'"):
        remote.read("s3://b/k")


@pytest.mark.parametrize(
    ("keys", "command"),
    [
        ("source: csv, path: 's3://b/list.csv'", "pack --csv s3://b/list.csv --out PACK"),
        ("source: csv, path: list.csv, root: 's3://b/x y'", "pack --csv list.csv --root 's3://b/x y' --out PACK"),
        ("source: folder, path: 'gs://b/images'", "pack --csv FILE --out PACK"),
    ],
)
def test_a_config_that_names_an_address_is_answered_with_the_command(tmp_path: Path, keys: str, command: str) -> None:
    (tmp_path / "config.yaml").write_text(f"data: {{{keys}}}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "config.yaml", [])
    assert "must be a path on this machine; received the address" in str(caught.value)
    assert f"{command}, then data.source=pack data.path=PACK" in str(caught.value)


def test_a_csv_file_with_addresses_is_answered_with_the_command(tmp_path: Path) -> None:
    write_images(tmp_path, "a.jpg")
    (tmp_path / "list.csv").write_text("path,label\na.jpg,x\nhttps://host/b.jpg,y\n")
    with pytest.raises(DataError) as caught:
        open_source(DataConfig(source="csv", path=tmp_path / "list.csv"))
    assert "line 3: https://host/b.jpg is an address, and training reads files of this machine" in str(caught.value)
    assert f"pack --csv {tmp_path}/list.csv --out PACK; then data.source=pack data.path=PACK" in str(caught.value)

"""Packs: a data set as a few large files with random access, in place of millions of small files.

    FOLDER/pack-00000-of-00012.array_record   the unchanged image files, a record each
    FOLDER/index.parquet                      a row per image, in the order of the data set: INDEX
    FOLDER/pack.json                          PackMetadata; written last, so a folder that has it is complete

Records are read by number, so only the requested bytes are read. `pipeline.data.packing` writes them.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf
from array_record.python.array_record_module import ArrayRecordReader

from pipeline.console import ProgressFn
from pipeline.data.scan_cache import key_hash
from pipeline.data.sources.base import CorruptImageError, FileStat, LabeledImage, read_in_python
from pipeline.errors import DataError
from pipeline.files import sha256_of

METADATA_FILE, INDEX_FILE, FORMAT = "pack.json", "index.parquet", 2
# Readers kept open, each with a file handle and 8 bytes a record; a shard is opened again in 60 microseconds.
OPEN_SHARDS = 128
# Nothing is read ahead, and of the end of the file, where the places of its records stand, 64 KiB at once: an image
# costs its own bytes.
BY_NUMBER = "readahead_buffer_size:0,max_parallelism:0,footer_prefetch_bytes:64K"
INDEX = pa.schema(
    [
        ("key", pa.string()),  # of the data set that was packed
        ("label", pa.int32()),  # position in the class names
        ("split", pa.string()),  # train, val or test; null where the data set brings none
        ("shard", pa.int32()),  # number of the file
        ("position", pa.int32()),  # number of the record in it
        ("bytes", pa.int64()),
        ("sha256", pa.binary(32)),  # of the image's file
        ("modified", pa.int64()),  # FileStat.version in the data set that was packed; 0 where it has none
    ]
)


@dataclass(frozen=True)
class PackShard:
    """A shard of a pack: one of the large files."""

    name: str
    num_images: int
    size: int
    """Bytes."""
    sha256: str
    """Of the file, hexadecimal."""


@dataclass(frozen=True)
class PackMetadata:
    """The contents of `pack.json`.

    Attributes:
        class_names: In the order of the labels.
        shards: In the order of their numbers.
        index: SHA-256 of index.parquet, hexadecimal.
        identity: Identity of the packed data set; see `pack_inputs.PackInput`.
    """

    class_names: tuple[str, ...]
    shards: tuple[PackShard, ...]
    index: str
    identity: dict[str, Any]

    def to_json(self) -> str:
        """Return the JSON text that `load` reads."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"


def load(folder: Path) -> tuple[PackMetadata, pa.Table]:
    """Read a pack's metadata and its index, of the schema INDEX.

    Raises:
        DataError: There is no finished pack, or one of the two is damaged.
    """
    path, index = folder / METADATA_FILE, folder / INDEX_FILE
    if not path.is_file():
        raise DataError(
            f"{folder} holds no finished pack (there is no {path.name}); python -m pipeline pack writes one"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if (version := values.pop("format")) != FORMAT:
            raise DataError(
                f"{path} is of format {version}; this program reads format {FORMAT}: pack the data set again"
            )
        shards = tuple(PackShard(**shard) for shard in values.pop("shards"))
        metadata = PackMetadata(**values | {"shards": shards, "class_names": tuple(values["class_names"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged: {error}; restore it from a copy, or pack the data set again") from None
    try:
        digest = sha256_of(index)
    except OSError as error:
        raise DataError(
            f"{index} cannot be read: {error.strerror}; restore it from a copy, or pack the data set again"
        ) from None
    if digest != metadata.index:
        raise DataError(
            f"{index} is not the one that {path.name} names (by SHA-256); restore it from a copy, or pack the data "
            "set again"
        )
    return metadata, pq.read_table(index, schema=INDEX, memory_map=False)


def read_record(path: Path, reader: ArrayRecordReader, position: int, sha256: bytes, key: str) -> bytes:
    """Read one image's file.

    Args:
        path: Path of the shard, for the message.
        reader: Reader of the shard.
        position: Number of the record in it.
        sha256: Expected SHA-256 of the file.
        key: Key of the image, for the message.

    Raises:
        CorruptImageError: The record differs from what was packed.
    """
    try:
        [data] = reader.read([position])
    except RuntimeError as error:
        raise CorruptImageError(
            key, f"is damaged: record {position} of {path}: {str(error).partition(';')[0]}"
        ) from None
    if hashlib.sha256(data).digest() != sha256:
        raise CorruptImageError(
            key, f"is damaged: record {position} of {path} has another SHA-256 than {INDEX_FILE} says"
        )
    return data


class PackSource:
    """The images of a pack; it may be read from several threads."""

    def __init__(self, folder: Path, metadata: PackMetadata, index: pa.Table) -> None:
        """Create the source."""
        self.class_names = metadata.class_names
        self._paths = [folder / shard.name for shard in metadata.shards]
        self._columns = {name: index[name].combine_chunks() for name in index.column_names}
        # Digests of the keys, sorted: a tenth of the memory of a dictionary.
        names = np.fromiter(map(key_hash, index["key"].to_pylist()), np.uint64, len(index))
        self._rows = np.argsort(names)
        self._names = names[self._rows]
        self._reader = lru_cache(OPEN_SHARDS)(self._open)

    def list_images(self) -> list[LabeledImage]:
        """List all images, always in the same order."""
        return list(map(LabeledImage, *(self._columns[name].to_pylist() for name in ("key", "label", "split"))))

    def stat(self, key: str) -> FileStat:
        """Return the size and version of the file of an image."""
        size, sha256 = self._look_up(key, "bytes", "sha256")
        return FileStat(size, int.from_bytes(sha256[:8], signed=True))

    def read(self, key: str) -> bytes:
        """Return the encoded file of an image."""
        shard, position, sha256 = self._look_up(key, "shard", "position", "sha256")
        try:
            reader = self._reader(shard)
        except RuntimeError as error:
            raise CorruptImageError(key, f"cannot be read: {self._paths[shard]}: {error}") from None
        return read_record(self._paths[shard], reader, position, sha256, key)

    def read_tf(self, key: tf.Tensor) -> tf.Tensor:
        """Return the encoded file of an image in a tf.data graph."""
        return read_in_python(self.read, key)

    def _look_up(self, key: str, *columns: str) -> list[Any]:
        name = key_hash(key)
        for row in self._rows[
            np.searchsorted(self._names, name) : np.searchsorted(self._names, name, "right")
        ].tolist():
            if self._columns["key"][row].as_py() == key:
                return [self._columns[column][row].as_py() for column in columns]
        raise DataError(f"{self._paths[0].parent} holds no image {key}")

    def _open(self, shard: int) -> ArrayRecordReader:
        return ArrayRecordReader(str(self._paths[shard]), BY_NUMBER)


def open_pack(folder: Path) -> PackSource:
    """Open a pack; only the presence and the size of the shards are checked.

    Raises:
        DataError: There is no finished pack, or a file of it is missing or damaged.
    """
    metadata, index = load(folder)
    for shard in metadata.shards:
        path = folder / shard.name
        size = path.stat().st_size if path.is_file() else None
        if size != shard.size:
            state = "is missing" if size is None else f"has {size:,} bytes where it had {shard.size:,}"
            raise DataError(
                f"{path} {state}; restore it from a copy, or run python -m pipeline pack with the data set again"
            )
    return PackSource(folder, metadata, index)


def find_corruption(path: Path, sha256: str, rows: pa.Table) -> list[str]:
    """Return the damages of a shard: a line for the file or for each damaged image; none if it is intact.

    Args:
        path: Path of the shard.
        sha256: Expected SHA-256 of its file, hexadecimal.
        rows: Rows of the index for this shard, in the order of their positions.
    """
    try:
        if sha256_of(path) == sha256:
            return []
        reader = ArrayRecordReader(str(path), BY_NUMBER)
    except OSError as error:
        return [f"{path}: {error.strerror}"]
    except RuntimeError as error:
        return [f"{path}: {error}"]
    problems = []
    for position, (key, digest) in enumerate(zip(rows["key"].to_pylist(), rows["sha256"].to_pylist(), strict=True)):
        try:
            read_record(path, reader, position, digest, key)
        except CorruptImageError as error:
            problems.append(str(error))
    return problems or [f"{path}: is not the file that was written, but all of its images are intact"]


def verify(folder: Path, progress: ProgressFn) -> tuple[PackMetadata, list[str]]:
    """Read a full pack and compare it with its hashes.

    Args:
        folder: Folder of the pack.
        progress: Called with the number of images done and of all.

    Returns:
        The metadata, and the `find_corruption` lines of all shards.

    Raises:
        DataError: See `load`.
    """
    metadata, index = load(folder)
    problems: list[str] = []
    done = 0
    for shard in metadata.shards:
        problems += find_corruption(folder / shard.name, shard.sha256, index.slice(done, shard.num_images))
        done += shard.num_images
        progress(done, len(index))
    return metadata, problems

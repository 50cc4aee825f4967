"""Writing packs. Whatever ends the program, run again it goes on from there.

What is not finished lies in FOLDER/.packing: numbered shards, each with its rows in a Parquet file that is written once
the shard has been read back and found right. When all are there, they are moved up under their names, and pack.json
last.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from filelock import FileLock, Timeout

from pipeline.data.pack_inputs import ROWS, PackInput, PackRecord
from pipeline.data.sources.base import format_list
from pipeline.data.sources.pack import (
    BY_NUMBER,
    DESCRIPTION,
    INDEX,
    INDEX_FILE,
    PackMetadata,
    Shard,
    find_corruption,
    load,
    read_record,
    sha256_of,
)
from pipeline.errors import DataError
from pipeline.files import fsync

STAGING, IDENTITY, LOCK = ".packing", "origin.json", ".lock"
OPTIONS = "group_size:1,uncompressed"  # a record can be read alone; compressed, 60.8 MB of photos take 0.1 % less
GO_ON = "put that right and run it again: it goes on from here"

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class ShardLimit:
    """When a shard is full."""

    size: float
    """Bytes; the picture that reaches them is the last."""
    pictures: int | None = None

    def reached(self, size: int, pictures: int) -> bool:
        """Whether a shard of so many bytes and pictures is full."""
        return size >= self.size or pictures == self.pictures


class PackResult(NamedTuple):
    """What `pack` came to."""

    description: PackMetadata
    index: pa.Table
    written: int
    """Pictures that were written now; the others had been before."""


class _Part(NamedTuple):
    """A shard that has been written."""

    path: Path
    rows: pa.Table
    sha256: str


def pack(origin: PackInput, folder: Path, limit: ShardLimit, progress: Progress) -> PackResult:
    """Packs a data set, goes on with it, or sees to it that a finished pack is whole and of this data set.

    Shards that are whole are left as they are, damaged ones are written again. A few pictures are in memory at any
    time.

    Args:
        origin: The data set.
        folder: Where to; made if it is missing.
        limit: Of a shard.
        progress: Called with the number of pictures done and of all, None if that is not known.

    Raises:
        DataError: The folder holds something else, the data set has changed since its pack was begun, or nothing can be
            written.
    """
    try:
        if folder.exists() and not (folder.is_dir() and _is_ours(folder)):
            raise DataError(f"{folder} exists and is no pack, and nothing is overwritten; choose another --out")
        staging = folder / STAGING
        with _alone(staging):
            if not (folder / DESCRIPTION).exists():
                written = 0 if (staging / DESCRIPTION).exists() else _fill(origin, staging, limit, progress)
                _publish(staging, folder)
                if written:
                    return PackResult(*load(folder), written)
            description, index = load(folder)
            _refuse_changes(origin, description.origin, {**origin.identity, **origin.settings}, index, folder)
            ends = np.cumsum([shard.pictures for shard in description.shards]).tolist()
            parts = [
                _Part(folder / shard.name, index.slice(end - shard.pictures, shard.pictures), shard.sha256)
                for shard, end in zip(description.shards, ends, strict=True)
            ]
            return PackResult(description, index, _repair(origin, parts, staging, progress))
    except OSError as error:
        raise DataError(f"{error.filename or folder}: {error.strerror or error}; {GO_ON}") from None


def _is_ours(folder: Path) -> bool:
    return (folder / DESCRIPTION).exists() or (folder / STAGING).exists() or not any(folder.iterdir())


@contextmanager
def _alone(staging: Path) -> Iterator[None]:
    """A block that no other process can be in for the same folder. A finished pack is left without a staging folder."""
    staging.mkdir(parents=True, exist_ok=True)
    lock = FileLock(staging / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise DataError(
            f"{staging.parent}: another process is packing into it; wait for its end, or choose another --out"
        ) from None
    try:
        yield
    finally:
        lock.release()
        if (staging.parent / DESCRIPTION).exists():
            shutil.rmtree(staging)


def _fill(origin: PackInput, staging: Path, limit: ShardLimit, progress: Progress) -> int:
    """Write what the staging folder still lacks, its description included; returns the number of pictures written."""
    identity, parts = staging / IDENTITY, _finished(staging)
    if identity.exists():
        rows = pa.concat_tables([part.rows for part in parts]) if parts else ROWS.empty_table()
        _refuse_changes(origin, json.loads(identity.read_text(encoding="utf-8")), origin.identity, rows, staging)
    else:
        _write(identity, json.dumps(origin.identity, ensure_ascii=False))
    written = _repair(origin, parts, staging, progress)
    done = sum(len(part.rows) for part in parts)
    pictures = origin.pictures(done, parts[-1].rows["key"][-1].as_py() if parts else None)
    for number in count(len(parts)):
        path = staging / f"{number:05}.array_record"
        rows = _write_shard(path, pictures, limit, lambda new, done=done: progress(done + new, origin.total))  # type: ignore[misc]
        if not len(rows):
            break
        parts.append(_Part(path, rows, sha256_of(path)))
        _note(parts[-1])
        done += len(rows)
        written += len(rows)
    if not parts:
        raise DataError("there are no pictures to pack")
    _describe(origin, staging, parts)
    return written


def _finished(staging: Path) -> list[_Part]:
    """The shards that have been written, from the first one on. What comes behind a gap is forgotten."""
    parts: list[_Part] = []
    for number in count():
        path = staging / f"{number:05}.array_record"
        try:
            rows = pq.read_table(path.with_suffix(".parquet"), memory_map=False)
            parts.append(_Part(path, rows.cast(ROWS), rows.schema.metadata[b"sha256"].decode()))
        except (
            OSError,
            pa.ArrowException,
            KeyError,
            TypeError,
            ValueError,
        ):  # it is missing, or a loss of power cut it short
            break
    for path in staging.glob("[0-9]*.parquet"):
        if int(path.stem) >= len(parts):
            path.unlink()
    return parts


def _repair(origin: PackInput, parts: Sequence[_Part], staging: Path, progress: Progress) -> int:
    """Read shards and writes those again that are damaged; returns the number of pictures written."""
    written, done, last = 0, 0, None
    for path, rows, sha256 in parts:
        if find_corruption(path, sha256, rows):
            again = staging / f"again-{path.name}"
            new = _write_shard(
                again, islice(origin.pictures(done, last), len(rows)), ShardLimit(float("inf")), lambda _: None
            )
            if new["sha256"] != rows["sha256"] or sha256_of(again) != sha256:
                raise DataError(
                    f"{path} is damaged, and does not come out the same again; delete {path.parent} and pack anew"
                )
            again.replace(path)
            written += len(rows)
        done, last = done + len(rows), rows["key"][-1].as_py()
        progress(done, origin.total)
    return written


def _write_shard(
    path: Path, pictures: Iterator[PackRecord], limit: ShardLimit, progress: Callable[[int], None]
) -> pa.Table:
    """Write pictures until the shard is full or there are no more, and reads them back from the disk.

    Returns their ROWS.
    """
    rows: list[dict[str, Any]] = []
    size = 0
    try:
        writer = ArrayRecordWriter(str(path), OPTIONS)
        for picture in pictures:
            writer.write(picture.data)
            size += len(picture.data)
            row = picture._asdict()
            rows.append(row | {"bytes": len(picture.data), "sha256": hashlib.sha256(row.pop("data")).digest()})
            progress(len(rows))
            if limit.reached(size, len(rows)):
                break
        writer.close()
    except RuntimeError as error:  # the writer's
        raise DataError(f"{path} cannot be written: {error}; {GO_ON}") from None
    fsync(path)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that it is the disk that is read
    reader = ArrayRecordReader(str(path), BY_NUMBER)
    for position, row in enumerate(rows):
        read_record(path, reader, position, row["sha256"], row["key"])
    return pa.Table.from_pylist(rows, ROWS)


def _note(part: _Part) -> None:
    """Make a shard one that is finished."""
    aside = part.path.with_suffix(".part")
    pq.write_table(part.rows.replace_schema_metadata({"sha256": part.sha256}), aside)
    aside.replace(part.path.with_suffix(".parquet"))


def _describe(origin: PackInput, staging: Path, parts: Sequence[_Part]) -> None:
    rows, sizes = pa.concat_tables([part.rows for part in parts]), [len(part.rows) for part in parts]
    class_names, labels = origin.classes(rows)
    columns = {name: rows[name] for name in INDEX.names if name in ROWS.names}
    columns["label"] = labels
    columns["shard"] = np.repeat(np.arange(len(parts), dtype=np.int32), sizes)
    columns["position"] = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])
    pq.write_table(pa.table([columns[name] for name in INDEX.names], schema=INDEX), staging / INDEX_FILE)
    fsync(staging / INDEX_FILE)
    shards = tuple(
        Shard(
            f"pack-{number:05}-of-{len(parts):05}.array_record", len(part.rows), part.path.stat().st_size, part.sha256
        )
        for number, part in enumerate(parts)
    )
    description = PackMetadata(
        class_names, shards, sha256_of(staging / INDEX_FILE), {**origin.identity, **origin.settings}
    )
    _write(staging / DESCRIPTION, description.to_json())


def _publish(staging: Path, folder: Path) -> None:
    """Move a described pack up. What has been moved before is not there any more."""
    shards = json.loads((staging / DESCRIPTION).read_text(encoding="utf-8"))["shards"]
    names = {f"{number:05}.array_record": shard["name"] for number, shard in enumerate(shards)}
    for moved in ({**names, INDEX_FILE: INDEX_FILE}, {DESCRIPTION: DESCRIPTION}):
        for name, final in moved.items():
            if (staging / name).exists():
                (staging / name).replace(folder / final)
        fsync(folder)  # what makes the pack one is on the disk behind all that it speaks of


def _refuse_changes(
    origin: PackInput, noted: Mapping[str, Any], now: Mapping[str, Any], rows: pa.Table, where: Path
) -> None:
    """Raise DataError if the data set is not the one whose pictures were packed."""
    found = origin.changes(rows)
    if not found:
        found = [
            f"{name}: was {noted.get(name)}, is {now.get(name)}"
            for name in {**noted, **now}
            if noted.get(name) != now.get(name)
        ]
    if found:
        raise DataError(
            f"{where} is of another data set, or of this one as it was before:\n{format_list(found)}\n"
            "Choose another --out, or delete that folder."
        )


def _write(path: Path, text: str) -> None:
    aside = path.with_suffix(".part")
    aside.write_text(text, encoding="utf-8")
    fsync(aside)
    aside.replace(path)

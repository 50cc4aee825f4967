"""Writing packs. If the program is interrupted at any point, running it again continues from there.

An unfinished pack lies in FOLDER/.packing: numbered shards, each with its rows in a Parquet file that is written after
the shard has been read back and verified. When all shards exist, they are moved to their final names, pack.json last.
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

from pipeline.console import ProgressFn
from pipeline.data.pack_inputs import ROWS, PackInput, PackRecord
from pipeline.data.sources.base import format_list
from pipeline.data.sources.pack import (
    BY_NUMBER,
    INDEX,
    INDEX_FILE,
    METADATA_FILE,
    PackMetadata,
    PackShard,
    find_corruption,
    load,
    read_record,
)
from pipeline.errors import DataError
from pipeline.files import atomic_path, atomic_write, exclusive_lock, fsync, sha256_of

STAGING, IDENTITY, LOCK = ".packing", "identity.json", ".lock"
OPTIONS = "group_size:1,uncompressed"  # a record can be read alone; compressed, 60.8 MB of photos take 0.1 % less
RESUME_HINT = "correct that and run it again: it continues from here"


@dataclass(frozen=True)
class ShardLimit:
    """The limit at which a shard is full."""

    max_bytes: float
    """Bytes; the image that reaches this limit is the last of its shard."""
    max_images: int | None = None

    def reached(self, num_bytes: int, num_images: int) -> bool:
        """Return whether a shard of so many bytes and images is full."""
        return num_bytes >= self.max_bytes or num_images == self.max_images


class PackResult(NamedTuple):
    """The result of `pack`."""

    metadata: PackMetadata
    index: pa.Table
    written: int
    """Number of images written by this call; the others existed already."""


class _WrittenShard(NamedTuple):
    """A shard that has been written."""

    path: Path
    rows: pa.Table
    sha256: str


def pack(pack_input: PackInput, folder: Path, limit: ShardLimit, progress: ProgressFn) -> PackResult:
    """Pack a data set, continue an interrupted pack, or verify that a finished pack is intact and of this data set.

    Intact shards are left as they are, damaged shards are written again. A few images are in memory at any time.

    Args:
        pack_input: The data set.
        folder: Folder of the pack; created if it is missing.
        limit: Limit of a shard.
        progress: Called with the number of images done and of all, None if that is not known.

    Raises:
        DataError: The folder holds something else, the data set has changed since its pack was begun, or nothing can be
            written.
    """
    try:
        if folder.exists() and not (folder.is_dir() and _is_pack_folder(folder)):
            raise DataError(f"{folder} exists and is no pack, and nothing is overwritten; choose another --out")
        staging = folder / STAGING
        with _exclusive_lock(staging):
            if not (folder / METADATA_FILE).exists():
                written = (
                    0 if (staging / METADATA_FILE).exists() else _write_shards(pack_input, staging, limit, progress)
                )
                _publish(staging, folder)
                if written:
                    return PackResult(*load(folder), written)
            metadata, index = load(folder)
            _check_unchanged(
                pack_input, metadata.identity, {**pack_input.identity, **pack_input.settings}, index, folder
            )
            ends = np.cumsum([shard.num_images for shard in metadata.shards]).tolist()
            parts = [
                _WrittenShard(folder / shard.name, index.slice(end - shard.num_images, shard.num_images), shard.sha256)
                for shard, end in zip(metadata.shards, ends, strict=True)
            ]
            return PackResult(metadata, index, _repair(pack_input, parts, staging, progress))
    except OSError as error:
        raise DataError(f"{error.filename or folder}: {error.strerror or error}; {RESUME_HINT}") from None


def _is_pack_folder(folder: Path) -> bool:
    return (folder / METADATA_FILE).exists() or (folder / STAGING).exists() or not any(folder.iterdir())


@contextmanager
def _exclusive_lock(staging: Path) -> Iterator[None]:
    """Hold the staging folder for this process. Remove it where the pack is finished."""
    staging.mkdir(parents=True, exist_ok=True)
    busy = f"{staging.parent}: another process is packing into it; wait for its end, or choose another --out"
    with exclusive_lock(staging / LOCK, DataError(busy)):
        try:
            yield
        finally:
            if (staging.parent / METADATA_FILE).exists():
                shutil.rmtree(staging)


def _write_shards(pack_input: PackInput, staging: Path, limit: ShardLimit, progress: ProgressFn) -> int:
    """Write what the staging folder lacks, including its metadata; return the number of images written."""
    identity, parts = staging / IDENTITY, _finished(staging)
    if identity.exists():
        rows = pa.concat_tables([part.rows for part in parts]) if parts else ROWS.empty_table()
        _check_unchanged(
            pack_input, json.loads(identity.read_text(encoding="utf-8")), pack_input.identity, rows, staging
        )
    else:
        atomic_write(identity, json.dumps(pack_input.identity, ensure_ascii=False))
    written = _repair(pack_input, parts, staging, progress)
    done = sum(len(part.rows) for part in parts)
    records = pack_input.records(done, parts[-1].rows["key"][-1].as_py() if parts else None)
    for number in count(len(parts)):
        path = staging / f"{number:05}.array_record"
        rows = _write_shard(path, records, limit, lambda new, done=done: progress(done + new, pack_input.total))  # type: ignore[misc]
        if not len(rows):
            break
        parts.append(_WrittenShard(path, rows, sha256_of(path)))
        _mark_finished(parts[-1])
        done += len(rows)
        written += len(rows)
    if not parts:
        raise DataError("there are no images to pack")
    _write_metadata(pack_input, staging, parts)
    return written


def _finished(staging: Path) -> list[_WrittenShard]:
    """Return the shards that have been written, from the first one on. Shards after a gap are discarded."""
    parts: list[_WrittenShard] = []
    for number in count():
        path = staging / f"{number:05}.array_record"
        try:
            rows = pq.read_table(path.with_suffix(".parquet"), memory_map=False)
            parts.append(_WrittenShard(path, rows.cast(ROWS), rows.schema.metadata[b"sha256"].decode()))
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
            break  # it is missing, or a loss of power cut it short
    for path in staging.glob("[0-9]*.parquet"):
        if int(path.stem) >= len(parts):
            path.unlink()
    return parts


def _repair(pack_input: PackInput, parts: Sequence[_WrittenShard], staging: Path, progress: ProgressFn) -> int:
    """Verify shards and rewrite the damaged ones; return the number of images written."""
    written, done, last = 0, 0, None
    for path, rows, sha256 in parts:
        if find_corruption(path, sha256, rows):
            again = staging / f"again-{path.name}"
            new = _write_shard(
                again, islice(pack_input.records(done, last), len(rows)), ShardLimit(float("inf")), lambda _: None
            )
            if new["sha256"] != rows["sha256"] or sha256_of(again) != sha256:
                raise DataError(
                    f"{path} is damaged, and cannot be reproduced identically; delete {path.parent} and pack again"
                )
            again.replace(path)
            written += len(rows)
        done, last = done + len(rows), rows["key"][-1].as_py()
        progress(done, pack_input.total)
    return written


def _write_shard(
    path: Path, records: Iterator[PackRecord], limit: ShardLimit, progress: Callable[[int], None]
) -> pa.Table:
    """Write images until the shard is full or there are no more, read them back from the disk, return their ROWS."""
    rows: list[dict[str, Any]] = []
    size = 0
    try:
        writer = ArrayRecordWriter(str(path), OPTIONS)
        for record in records:
            writer.write(record.data)
            size += len(record.data)
            row = record._asdict()
            rows.append(row | {"bytes": len(record.data), "sha256": hashlib.sha256(row.pop("data")).digest()})
            progress(len(rows))
            if limit.reached(size, len(rows)):
                break
        writer.close()
    except RuntimeError as error:  # the writer's
        raise DataError(f"{path} cannot be written: {error}; {RESUME_HINT}") from None
    fsync(path)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that the disk is read, not the page cache
    reader = ArrayRecordReader(str(path), BY_NUMBER)
    for position, row in enumerate(rows):
        read_record(path, reader, position, row["sha256"], row["key"])
    return pa.Table.from_pylist(rows, ROWS)


def _mark_finished(part: _WrittenShard) -> None:
    """Mark a shard as finished."""
    with atomic_path(part.path.with_suffix(".parquet")) as temporary:
        pq.write_table(part.rows.replace_schema_metadata({"sha256": part.sha256}), temporary)


def _write_metadata(pack_input: PackInput, staging: Path, parts: Sequence[_WrittenShard]) -> None:
    rows, sizes = pa.concat_tables([part.rows for part in parts]), [len(part.rows) for part in parts]
    class_names, labels = pack_input.classes(rows)
    columns = {name: rows[name] for name in INDEX.names if name in ROWS.names}
    columns["label"] = labels
    columns["shard"] = np.repeat(np.arange(len(parts), dtype=np.int32), sizes)
    columns["position"] = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])
    pq.write_table(pa.table([columns[name] for name in INDEX.names], schema=INDEX), staging / INDEX_FILE)
    fsync(staging / INDEX_FILE)
    shards = tuple(
        PackShard(
            f"pack-{number:05}-of-{len(parts):05}.array_record", len(part.rows), part.path.stat().st_size, part.sha256
        )
        for number, part in enumerate(parts)
    )
    metadata = PackMetadata(
        class_names, shards, sha256_of(staging / INDEX_FILE), {**pack_input.identity, **pack_input.settings}
    )
    atomic_write(staging / METADATA_FILE, metadata.to_json())


def _publish(staging: Path, folder: Path) -> None:
    """Move a complete pack from the staging folder to its final place. Files that were moved before are skipped."""
    shards = json.loads((staging / METADATA_FILE).read_text(encoding="utf-8"))["shards"]
    names = {f"{number:05}.array_record": shard["name"] for number, shard in enumerate(shards)}
    for moved in ({**names, INDEX_FILE: INDEX_FILE}, {METADATA_FILE: METADATA_FILE}):
        for name, final in moved.items():
            if (staging / name).exists():
                (staging / name).replace(folder / final)
        fsync(folder)  # pack.json reaches the disk after all files that it names


def _check_unchanged(
    pack_input: PackInput, recorded: Mapping[str, Any], current: Mapping[str, Any], rows: pa.Table, folder: Path
) -> None:
    """Raise DataError if the data set is not the one whose images were packed."""
    changes = pack_input.changes(rows)
    if not changes:
        changes = [
            f"{name}: was {recorded.get(name)}, is {current.get(name)}"
            for name in {**recorded, **current}
            if recorded.get(name) != current.get(name)
        ]
    if changes:
        raise DataError(
            f"{folder} is of another data set, or of an earlier state of this one:\n{format_list(changes)}\n"
            "Choose another --out, or delete that folder."
        )

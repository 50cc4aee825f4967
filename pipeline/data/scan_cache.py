"""A cache of the results of earlier scans, so that unchanged files need not be decoded again.

There is one file per data set under XDG_CACHE_HOME: a checksum, then the records of FACTS. The file is written aside
and renamed: of two processes one wins, and none reads an incomplete file. A file that is damaged or of another version
counts as absent. Files that cannot be used are not stored.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL
import tensorflow as tf

from pipeline.data.sources.base import FileStat
from pipeline.files import atomic_path, cache_folder, sha256_of

CHECKSUM_BYTES = 32  # bytes
CHUNK_ROWS = 65_536  # records
SCAN_VERSION = 3  # to be increased when the same file may give another result
FACTS = np.dtype(
    [
        ("name", np.uint64),  # of a digest of the key
        ("size", np.int64),  # bytes
        ("modified", np.int64),  # FileStat.version
        ("sha256", "V32"),
        ("kind", "S16"),  # Pillow's name of the format
        ("height", np.int32),  # pixels, as stored
        ("width", np.int32),
        ("orientation", np.uint8),  # EXIF
        ("traits", np.uint8),  # of inspection.ImageFlag
        ("maximum", np.uint8),  # greatest value of a pixel, as decoded
        ("phash", np.uint64),  # the others: see splits.Signature
        ("thumbnail", np.uint8, (8, 8, 3)),
        ("pixels", np.uint64),
        ("perceptual", np.bool_),
    ]
)


class ScanCache:
    """The cached scan results of a data set's files."""

    def __init__(self, data: Path | None, background: str = "white") -> None:
        """Open the cache of a data set.

        Args:
            data: The folder or file that names the data set; None disables the cache.
            background: Color behind transparent pixels; results for another one do not count.
        """
        self._path, self._background = _cache_path(data) if data is not None else None, background
        self._facts = _read(self._path, background) if self._path is not None else np.empty(0, FACTS)
        self._names = np.ascontiguousarray(self._facts["name"])
        self._has_changes = False

    def find(self, key: str, status: FileStat) -> np.ndarray | None:
        """Return FACTS () of a file, or None if they are not known for this size and version."""
        name = key_hash(key)
        position = int(np.searchsorted(self._names, name))
        if position == len(self._names) or self._names[position] != name:
            return None
        facts = self._facts[position]
        return facts if (facts["size"], facts["modified"]) == status else None

    def stamp(self, facts: np.ndarray, key: str, status: FileStat) -> None:
        """Store in FACTS () the file, size and version that they describe.

        `status` must have been read before the file.
        """
        self._has_changes = True
        facts["name"], facts["size"], facts["modified"] = key_hash(key), *status

    def save(self, facts: np.ndarray, *, full_dataset: bool) -> None:
        """Save the stamped records of FACTS (N,); if the file cannot be written, nothing is saved.

        Args:
            facts: Results of a scan.
            full_dataset: Whether the scan covered the full data set and was completed. If so, the results replace the
                cache; else they are added to it.
        """
        if self._path is None or not self._has_changes:
            return
        if not full_dataset:
            facts = np.concatenate([facts, self._facts[~np.isin(self._names, facts["name"])]])
        stamped = np.flatnonzero(facts["name"])
        order = stamped[np.argsort(facts["name"][stamped])]
        content = hashlib.sha256()
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(self._path, unique=True) as temporary, temporary.open("wb") as file:
                file.write(bytes(CHECKSUM_BYTES))
                for start in range(0, len(order), CHUNK_ROWS):
                    records = facts[order[start : start + CHUNK_ROWS]].tobytes()
                    content.update(records)
                    file.write(records)
                file.seek(0)
                file.write(_checksum(content.digest(), self._background))


def _cache_path(data: Path) -> Path | None:
    try:
        return cache_folder() / "scans" / sha256_of(os.fsencode(data.resolve()))[:16]
    except (OSError, RuntimeError):  # no home
        return None


def _read(path: Path, background: str) -> np.ndarray:
    """Return FACTS (N,), sorted by name and mapped from the disk."""
    try:
        with path.open("rb") as file:
            intact = file.read(CHECKSUM_BYTES) == _checksum(hashlib.file_digest(file, "sha256").digest(), background)
        return np.memmap(path, FACTS, "r", offset=CHECKSUM_BYTES) if intact else np.empty(0, FACTS)
    except (OSError, ValueError):  # ValueError: no record in it
        return np.empty(0, FACTS)


def _checksum(content: bytes, background: str) -> bytes:
    """Return a digest of the records' digest and of the versions and settings that determine them."""
    return hashlib.sha256(
        repr((SCAN_VERSION, FACTS.descr, tf.__version__, PIL.__version__, background)).encode() + content
    ).digest()


def key_hash(key: str) -> np.uint64:
    """Return a 64-bit hash of a key, never 0."""
    return np.uint64(int.from_bytes(hashlib.blake2b(os.fsencode(key), digest_size=8).digest()) or 1)

"""What earlier scans found in files that have not changed since, so that they need not be decoded again.

One file per data set under XDG_CACHE_HOME: a seal, then FACTS, one record after the other. It is written aside and
renamed, so that of two processes one wins and none reads a half; one that is damaged, or of another version, counts as
absent. Bad files are not kept.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL
import tensorflow as tf

from pipeline.data.sources.base import FileStat

SEAL = 32  # bytes
CHUNK_ROWS = 65_536  # records
SCAN = 1  # to be raised when the same file may come out otherwise
FACTS = np.dtype(
    [
        ("name", np.uint64),  # of a digest of the key
        ("size", np.int64),  # bytes
        ("modified", np.int64),  # Status.version
        ("sha256", "V32"),
        ("kind", np.uint8),  # position in FORMATS
        ("height", np.int32),  # pixels, as stored
        ("width", np.int32),
        ("orientation", np.uint8),  # EXIF
        ("traits", np.uint8),  # of inspection.Trait
        ("phash", np.uint64),  # the others: see splits.Signature
        ("thumbnail", np.uint8, (8, 8, 3)),
        ("pixels", np.uint64),
        ("perceptual", np.bool_),
    ]
)


class ScanCache:
    """The facts about a data set's files."""

    def __init__(self, data: Path | None) -> None:
        """Open what there is.

        Args:
            data: The folder or file that names the data set; None keeps nothing.
        """
        self._path = _place(data) if data is not None else None
        self._facts = _read(self._path) if self._path is not None else np.empty(0, FACTS)
        self._names = np.ascontiguousarray(self._facts["name"])
        self._news = False

    def find(self, key: str, status: FileStat) -> np.ndarray | None:
        """FACTS () of a file, if they are known of this size and version."""
        name = key_hash(key)
        place = int(np.searchsorted(self._names, name))
        if place == len(self._names) or self._names[place] != name:
            return None
        facts = self._facts[place]
        return facts if (facts["size"], facts["modified"]) == status else None

    def stamp(self, facts: np.ndarray, key: str, status: FileStat) -> None:
        """Notes in FACTS () of which file, size and version they are.

        `status` must be from before the file was read.
        """
        self._news = True
        facts["name"], facts["size"], facts["modified"] = key_hash(key), *status

    def save(self, facts: np.ndarray, *, whole: bool) -> None:
        """Keep the signed ones of FACTS (N,); where that cannot be done, nothing is kept.

        Args:
            facts: What a scan found.
            whole: Whether it was of the whole data set, and came to its end. If so, they take the place of what was
                known; else they are added to it.
        """
        if self._path is None or not self._news:
            return
        if not whole:
            facts = np.concatenate([facts, self._facts[~np.isin(self._names, facts["name"])]])
        signed = np.flatnonzero(facts["name"])
        order = signed[np.argsort(facts["name"][signed])]
        part, content = self._path.with_name(f"{self._path.name}.{os.urandom(4).hex()}"), hashlib.sha256()
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                file.write(bytes(SEAL))
                for start in range(0, len(order), CHUNK_ROWS):
                    records = facts[order[start : start + CHUNK_ROWS]].tobytes()
                    content.update(records)
                    file.write(records)
                file.seek(0)
                file.write(_checksum(content.digest()))
            part.replace(self._path)
        except OSError:
            with suppress(OSError):
                part.unlink()


def _place(data: Path) -> Path | None:
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return root / "efficientnet-pipeline" / "scans" / hashlib.sha256(os.fsencode(data.resolve())).hexdigest()[:16]
    except (OSError, RuntimeError):  # no home
        return None


def _read(path: Path) -> np.ndarray:
    """FACTS (N,), sorted by name, read from the disk where they are used."""
    try:
        with path.open("rb") as file:
            intact = file.read(SEAL) == _checksum(hashlib.file_digest(file, "sha256").digest())
        return np.memmap(path, FACTS, "r", offset=SEAL) if intact else np.empty(0, FACTS)
    except (OSError, ValueError):  # ValueError: no record in it
        return np.empty(0, FACTS)


def _checksum(content: bytes) -> bytes:
    """A digest of the records' digest and of what decided about them."""
    return hashlib.sha256(repr((SCAN, FACTS.descr, tf.__version__, PIL.__version__)).encode() + content).digest()


def key_hash(key: str) -> np.uint64:
    """64 bits that stand for a key, never 0."""
    return np.uint64(int.from_bytes(hashlib.blake2b(os.fsencode(key), digest_size=8).digest()) or 1)

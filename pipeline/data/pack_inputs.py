"""What can be packed: here the data set of a config, in `tfrecord` what exists as TFRecord."""

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from pipeline.data.inspection import too_large
from pipeline.data.sources.base import DataSource, Sample
from pipeline.errors import DataError

# files that are read before they are needed, by as many threads: over a network it is waiting that takes the time
PREFETCH = 16
ROWS = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.int64()),  # as the origin counts
        ("class_name", pa.string()),  # null where the origin does not tell it with each picture
        ("split", pa.string()),  # null where the data bring none
        ("bytes", pa.int64()),
        ("sha256", pa.binary(32)),
        ("modified", pa.int64()),  # Status.version; 0 where there is none
    ]
)


class PackRecord(NamedTuple):
    """One picture on its way into a pack; see ROWS."""

    key: str
    label: int
    class_name: str | None
    split: str | None
    modified: int
    data: bytes
    """The encoded file."""


class PackInput(Protocol):
    """A data set that can be packed."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What the data set is the same by, for JSON: each thing's name and value.

        Found without reading the pictures.
        """

    @property
    def settings(self) -> Mapping[str, Any]:
        """The same of what decides about the finished pack only, and may be changed before it is."""

    @property
    def total(self) -> int | None:
        """The number of pictures, if it is known."""

    def pictures(self, start: int, last: str | None) -> Iterator[PackRecord]:
        """The pictures from number `start` on, always in the same order; `last` is the key of the one in front of it.

        Raises:
            DataError: One cannot be read, or is not what a picture in a pack may be.
        """

    def changes(self, rows: pa.Table) -> list[str]:
        """What has become of packed pictures since, a line each.

        `rows` have the columns key, label, split, bytes, sha256 and modified.
        """

    def classes(self, rows: pa.Table) -> tuple[tuple[str, ...], np.ndarray]:
        """The class names, and of all pictures, ROWS (N,), the labels int32 (N,) that are places among them.

        Raises:
            DataError: They cannot be told.
        """


class SourceOrigin:
    """The data set of a config."""

    def __init__(self, source: DataSource) -> None:
        self._source, self._samples = source, source.samples()
        self.total, self.settings = len(self._samples), dict[str, Any]()
        digest = hashlib.sha256(json.dumps(source.class_names).encode())
        for sample in self._samples:
            digest.update(json.dumps(sample).encode())
        self.identity = {
            "number of classes": len(source.class_names),
            "number of pictures": self.total,
            "digest of names, labels and splits": digest.hexdigest(),
        }

    def pictures(self, start: int, last: str | None) -> Iterator[PackRecord]:
        del last
        ahead: deque[Future[PackRecord]] = deque()
        with ThreadPoolExecutor(PREFETCH) as pool:
            try:
                for sample in self._samples[start:]:
                    ahead.append(pool.submit(self._read, sample))
                    if len(ahead) == PREFETCH:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, sample: Sample) -> PackRecord:
        try:
            status = self._source.stat(sample.key)
            if status is not None and (reason := too_large(status.size)):
                raise DataError(f"{sample.key} {reason}; take it out of the data set")
            data = self._source.read(sample.key)
        except OSError as error:
            raise DataError(
                f"{sample.key} cannot be read: {error.strerror}; put that right, or take it out of the data set"
            ) from None
        return PackRecord(sample.key, sample.label, None, sample.split, 0 if status is None else status.version, data)

    def changes(self, rows: pa.Table) -> list[str]:
        found = []
        now = {sample.key: sample for sample in self._samples}
        columns = (rows[name].to_pylist() for name in ("key", "label", "split", "bytes", "modified", "sha256"))
        for key, label, split, size, modified, sha256 in zip(*columns, strict=True):
            if key not in now:
                found.append(f"{key}: is gone")
            elif now[key] != (key, label, split):
                found.append(f"{key}: has another {'split' if now[key].label == label else 'label'}")
            elif self._other_status(key, size, modified) and hashlib.sha256(self._source.read(key)).digest() != sha256:
                found.append(f"{key}: has other contents")
        return found

    def _other_status(self, key: str, size: int, modified: int) -> bool:
        """Whether it may have changed; one that was copied or touched has not."""
        status = self._source.stat(key)
        return status is not None and status != (size, modified)

    def classes(self, rows: pa.Table) -> tuple[tuple[str, ...], np.ndarray]:
        return self._source.class_names, rows["label"].to_numpy().astype(np.int32)

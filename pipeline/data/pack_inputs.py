"""Inputs of packing: the data set of a config; TFRecord files are in `tfrecord`."""

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from pipeline.data.inspection import packable, size_problem
from pipeline.data.sources.base import DataSource, LabeledImage
from pipeline.errors import DataError

# files read ahead, by as many threads: over a network, latency dominates
PREFETCH = 16
ROWS = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.int64()),  # as the input counts them
        ("class_name", pa.string()),  # null where the input does not store it with each image
        ("split", pa.string()),  # null where the data have no splits
        ("bytes", pa.int64()),
        ("sha256", pa.binary(32)),
        ("modified", pa.int64()),  # FileStat.version; 0 where there is none
    ]
)


class PackRecord(NamedTuple):
    """One image on its way into a pack; see ROWS."""

    key: str
    label: int
    class_name: str | None
    split: str | None
    modified: int
    data: bytes
    """The encoded file, as `inspection.packable` returns it."""


class PackInput(Protocol):
    """A data set that can be packed."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Names and values, for JSON, that identify the data set.

        They are computed without reading the images.
        """

    @property
    def settings(self) -> Mapping[str, Any]:
        """Names and values that affect the finished pack only; they may change until it is finished."""

    @property
    def total(self) -> int | None:
        """Number of images, if it is known."""

    def records(self, start: int, last: str | None) -> Iterator[PackRecord]:
        """Yield the images from number `start` on, always in the same order; `last` is the key of the image before it.

        Raises:
            DataError: An image cannot be read, or is not valid in a pack.
        """

    def changes(self, rows: pa.Table) -> list[str]:
        """Return the changes of packed images since they were packed, a line each.

        `rows` have the columns key, label, split, bytes, sha256 and modified.
        """

    def classes(self, rows: pa.Table) -> tuple[tuple[str, ...], np.ndarray]:
        """Return the class names, and for all images, ROWS (N,), the labels int32 (N,) that are indices into them.

        Raises:
            DataError: The class names cannot be determined.
        """


class SourceInput:
    """The data set of a config, as an input of packing."""

    def __init__(self, source: DataSource) -> None:
        """Create the input."""
        self._source, self._images = source, source.list_images()
        self.total, self.settings = len(self._images), dict[str, Any]()
        digest = hashlib.sha256(json.dumps(source.class_names).encode())
        for image in self._images:
            digest.update(json.dumps(image).encode())
        self.identity = {
            "number of classes": len(source.class_names),
            "number of images": self.total,
            "digest of names, labels and splits": digest.hexdigest(),
        }

    def records(self, start: int, last: str | None) -> Iterator[PackRecord]:
        """Yield the records in the order of the pack."""
        del last
        ahead: deque[Future[PackRecord]] = deque()
        with ThreadPoolExecutor(PREFETCH) as pool:
            try:
                for image in self._images[start:]:
                    ahead.append(pool.submit(self._read, image))
                    if len(ahead) == PREFETCH:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, image: LabeledImage) -> PackRecord:
        try:
            status = self._source.stat(image.key)
            if status is not None and (reason := size_problem(status.size)):
                raise DataError(f"{image.key} {reason}; remove it from the data set")
            data = packable(self._source.read(image.key))
        except OSError as error:
            raise DataError(
                f"{image.key} cannot be read: {error.strerror}; correct that, or remove it from the data set"
            ) from None
        return PackRecord(image.key, image.label, None, image.split, 0 if status is None else status.version, data)

    def changes(self, rows: pa.Table) -> list[str]:
        """List what has changed since the pack was begun."""
        changes = []
        current = {image.key: image for image in self._images}
        columns = (rows[name].to_pylist() for name in ("key", "label", "split", "bytes", "modified", "sha256"))
        for key, label, split, size, modified, sha256 in zip(*columns, strict=True):
            if key not in current:
                changes.append(f"{key}: is gone")
            elif current[key] != (key, label, split):
                changes.append(f"{key}: has another {'split' if current[key].label == label else 'label'}")
            elif self._other_status(key, size, modified) and self._digest(key) != sha256:
                changes.append(f"{key}: has other contents")
        return changes

    def _other_status(self, key: str, size: int, modified: int) -> bool:
        """Return whether size or version differ; the contents of a copied or touched file have not changed."""
        status = self._source.stat(key)
        return status is not None and status != (size, modified)

    def _digest(self, key: str) -> bytes:
        """Return the SHA-256 of what a pack holds of an image."""
        return hashlib.sha256(packable(self._source.read(key))).digest()

    def classes(self, rows: pa.Table) -> tuple[tuple[str, ...], np.ndarray]:
        """Return the class names in the order of the labels."""
        return self._source.class_names, rows["label"].to_numpy().astype(np.int32)

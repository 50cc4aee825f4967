"""The rows of a manifest where the stream looks them up.

In a file that is mapped into memory, so that they take none of their own.
"""

import tempfile
from collections.abc import Callable
from typing import IO, NamedTuple

import numpy as np
import pyarrow as pa
import tensorflow as tf

from pipeline.data.manifest import CHUNK_ROWS, Manifest
from pipeline.errors import DataError

NUMBERS = ("label", "height", "width", "orientation")
BYTES = tuple(bytes([value]) for value in range(256))


class IndexBatch(NamedTuple):
    """Some rows of a manifest; scalars, or (N,) each."""

    index: tf.Tensor
    """int64, the row's number in the manifest."""
    key: tf.Tensor
    """string"""
    label: tf.Tensor
    """int32"""
    height: tf.Tensor
    """int32, pixels as stored"""
    width: tf.Tensor
    """int32"""
    orientation: tf.Tensor
    """int32, EXIF 1 to 8"""


def memory_mapped_table(manifest: Manifest, indices: np.ndarray) -> Callable[[tf.Tensor], IndexBatch]:
    """Write rows into a temporary file without a name, which goes with the last tensor that is mapped from it.

    Args:
        manifest: The samples.
        indices: Of the rows, int64 (n,), n at least 1.

    Returns:
        A function from places in `indices`, int64 (N,), to their rows, which tf.data can call.

    Raises:
        DataError: The file cannot be written.
    """
    try:
        with tempfile.TemporaryFile() as text, tempfile.TemporaryFile() as numbers:
            _write(manifest, indices, text, numbers)
            letters, table = (
                _mapped(text, np.uint8, (-1,)),
                _mapped(numbers, np.int64, (len(indices), 3 + len(NUMBERS))),
            )
    except OSError as error:
        raise DataError(
            f"{tempfile.gettempdir()}: the table of {len(indices):,} images cannot be written ({error.strerror}); "
            "set TMPDIR to a folder on a disk with room"
        ) from error

    @tf.autograph.experimental.do_not_convert  # there is nothing to convert
    def rows(places: tf.Tensor) -> IndexBatch:
        index, start, end, *others = tf.unstack(tf.gather(table, places), axis=1)
        spans = tf.ragged.range(start, end)
        characters = tf.gather(BYTES, tf.cast(tf.gather(letters, spans.values), tf.int32))
        keys = tf.strings.unsorted_segment_join(characters, spans.value_rowids(), spans.nrows())
        return IndexBatch(index, keys, *(tf.cast(number, tf.int32) for number in others))

    return rows


def _write(manifest: Manifest, indices: np.ndarray, text: IO[bytes], numbers: IO[bytes]) -> None:
    """The keys one behind the other, UTF-8.

    And of each row its index, the bytes at which its key begins and ends, and NUMBERS, int64.
    """
    written = 0
    for first in range(0, len(indices), CHUNK_ROWS):
        some = indices[first : first + CHUNK_ROWS]
        keys = pa.table({"key": manifest.table["key"].iloc[some]})["key"].cast(pa.large_string()).combine_chunks()
        _, offsets, characters = keys.buffers()
        ends = np.frombuffer(offsets, np.int64)[keys.offset : keys.offset + len(keys) + 1]
        text.write(characters[int(ends[0]) : int(ends[-1])])
        ends = ends - ends[0] + written
        written = int(ends[-1])
        row = np.empty((len(some), 3 + len(NUMBERS)), np.int64)
        row[:, 0], row[:, 1], row[:, 2] = some, ends[:-1], ends[1:]
        for column, name in enumerate(NUMBERS, 3):
            row[:, column] = manifest.table[name].to_numpy()[some]
        numbers.write(row.data)


def _mapped(file: IO[bytes], dtype: type[np.generic], shape: tuple[int, ...]) -> tf.Tensor:
    """The file's contents as a tensor without a copy."""
    file.flush()
    contents = np.memmap(file, dtype, "c").reshape(shape)
    return tf.experimental.dlpack.from_dlpack(contents.__dlpack__())

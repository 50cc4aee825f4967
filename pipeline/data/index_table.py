"""Rows of a manifest in memory-mapped files, which tf.data looks up."""

import tempfile
from collections.abc import Callable
from typing import IO, NamedTuple

import numpy as np
import pyarrow as pa
import tensorflow as tf

from pipeline.console import plural
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
    """Write rows of a manifest to a memory-mapped file, so that looking them up takes no memory of the process.

    The temporary file has no name. It is deleted together with the last tensor that maps it.

    Args:
        manifest: All images.
        indices: Indices of the rows, int64 (n,), n at least 1.

    Returns:
        A function that tf.data can call, from positions in `indices`, int64 (N,), to their rows.

    Raises:
        DataError: The file cannot be written.
    """
    try:
        with tempfile.TemporaryFile() as text, tempfile.TemporaryFile() as numbers:
            _write_table(manifest, indices, text, numbers)
            letters, table = (
                _memory_mapped(text, np.uint8, (-1,)),
                _memory_mapped(numbers, np.int64, (len(indices), 3 + len(NUMBERS))),
            )
    except OSError as error:
        raise DataError(
            f"{tempfile.gettempdir()}: the table of {plural(len(indices), 'image')} cannot be written "
            f"({error.strerror}); set TMPDIR to a folder on a disk with room"
        ) from error

    @tf.autograph.experimental.do_not_convert  # there is nothing to convert
    def lookup(positions: tf.Tensor) -> IndexBatch:
        index, start, end, *others = tf.unstack(tf.gather(table, positions), axis=1)
        spans = tf.ragged.range(start, end)
        characters = tf.gather(BYTES, tf.cast(tf.gather(letters, spans.values), tf.int32))
        keys = tf.strings.unsorted_segment_join(characters, spans.value_rowids(), spans.nrows())
        return IndexBatch(index, keys, *(tf.cast(number, tf.int32) for number in others))

    return lookup


def _write_table(manifest: Manifest, indices: np.ndarray, text: IO[bytes], numbers: IO[bytes]) -> None:
    """Write the concatenated keys, UTF-8, to `text`, and a row of int64 per image to `numbers`.

    A row holds the image's index, the bytes at which its key begins and ends, and the columns NUMBERS.
    """
    written = 0
    for first in range(0, len(indices), CHUNK_ROWS):
        chunk = indices[first : first + CHUNK_ROWS]
        keys = pa.table({"key": manifest.table["key"].iloc[chunk]})["key"].cast(pa.large_string()).combine_chunks()
        _, offsets, characters = keys.buffers()
        ends = np.frombuffer(offsets, np.int64)[keys.offset : keys.offset + len(keys) + 1]
        text.write(characters[int(ends[0]) : int(ends[-1])])
        ends = ends - ends[0] + written
        written = int(ends[-1])
        rows = np.empty((len(chunk), 3 + len(NUMBERS)), np.int64)
        rows[:, 0], rows[:, 1], rows[:, 2] = chunk, ends[:-1], ends[1:]
        for column, name in enumerate(NUMBERS, 3):
            rows[:, column] = manifest.table[name].to_numpy()[chunk]
        numbers.write(rows.data)


def _memory_mapped(file: IO[bytes], dtype: type[np.generic], shape: tuple[int, ...]) -> tf.Tensor:
    """Return the file's contents as a tensor, without a copy."""
    file.flush()
    contents = np.memmap(file, dtype, "c").reshape(shape)
    return tf.experimental.dlpack.from_dlpack(contents.__dlpack__())

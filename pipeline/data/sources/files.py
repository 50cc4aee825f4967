"""Image files under one root, as the folder and CSV sources name them."""

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

import pyarrow as pa
import tensorflow as tf

from pipeline.data.sources.base import FileStat, LabeledImage


class FileSource:
    """Image files under one root."""

    def __init__(
        self,
        root: Path,
        class_names: tuple[str, ...],
        images: Sequence[LabeledImage],
        skipped_suffixes: Mapping[str, int] | None = None,
    ) -> None:
        """Create the source.

        Args:
            root: Folder that the keys are relative to.
            class_names: K names.
            images: All images.
            skipped_suffixes: Number of files in the classes that are no images by their suffix, by suffix.
        """
        self.root, self.class_names = root, class_names
        self.skipped_suffixes = dict(skipped_suffixes or {})
        # Millions of Python's strings and tuples would take several times the memory.
        kinds = (pa.string(), pa.int32(), pa.string())
        self._columns = [pa.array([image[number] for image in images], kind) for number, kind in enumerate(kinds)]

    def list_images(self) -> list[LabeledImage]:
        """List all images, always in the same order."""
        return list(map(LabeledImage, *(column.to_pylist() for column in self._columns)))

    def stat(self, key: str) -> FileStat:
        """Return the size and version of the file of an image."""
        return file_stat(self.root / key)

    def read(self, key: str) -> bytes:
        """Return the encoded file of an image."""
        return (self.root / key).read_bytes()

    def read_tf(self, key: tf.Tensor) -> tf.Tensor:
        """Return the encoded file of an image in a tf.data graph."""
        return tf.io.read_file(tf.strings.join([self.root.as_posix(), "/", key]))


def file_stat(path: Path) -> FileStat:
    """Return the size and version of a file.

    Raises:
        OSError: There is no such file.
    """
    status = path.stat()
    return FileStat(status.st_size, version_of(f"{status.st_ino} {status.st_mtime_ns} {status.st_ctime_ns}"))


def version_of(identity: str) -> int:
    """Return FileStat.version, an int64, of a text that is another one after each change of a file."""
    return int.from_bytes(blake2b(identity.encode(), digest_size=8).digest(), signed=True)

"""A CSV file whose images lie at addresses or on this machine, as an input of packing."""

import posixpath
from pathlib import Path

import tensorflow as tf

from pipeline.config.base import is_address
from pipeline.config.data import ColumnsConfig
from pipeline.data import remote
from pipeline.data.sources.base import FileStat, LabeledImage, LayoutError, read_in_python
from pipeline.data.sources.csv_file import read_images, relative_key
from pipeline.data.sources.files import file_stat
from pipeline.errors import DataError


class CsvSource:
    """The images of a CSV file, each at an address or on this machine."""

    def __init__(self, address: str, columns: ColumnsConfig, root: str | None) -> None:
        """Read the file.

        Args:
            address: Path or address of the CSV file.
            columns: Names of the columns.
            root: Folder that relative paths start from, as a path or an address; None for that of the file.

        Raises:
            DataError: The file cannot be read, or rows are wrong, all of which are listed with their line numbers.
        """
        if is_address(address):
            content = remote.read(address)
        else:
            try:
                content = Path(address).read_bytes()
            except OSError as error:
                raise DataError(f"--csv {address} cannot be read: {error.strerror}") from None
        folder = remote.parent(address) if is_address(address) else str(Path(address).parent)
        self._root = folder if root is None else root
        if not is_address(self._root):
            self._root = str(Path(self._root).expanduser().resolve())
        hint = f"Relative paths start from {self._root}; --root changes that."
        self.class_names, self._images, wrong = read_images(
            content, f"--csv {address}", columns, self._key, self._problem, hint
        )
        if wrong is not None:
            raise LayoutError([wrong], self)

    def list_images(self) -> list[LabeledImage]:
        """List all images, always in the same order."""
        return self._images

    def stat(self, key: str) -> FileStat | None:
        """Return the size and version of a file on this machine; None for one at an address."""
        location = self._location(key)
        return None if is_address(location) else file_stat(Path(location))

    def read(self, key: str) -> bytes:
        """Return the encoded file of an image."""
        location = self._location(key)
        return remote.read(location) if is_address(location) else Path(location).read_bytes()

    def read_tf(self, key: tf.Tensor) -> tf.Tensor:
        """Return the encoded file of an image in a tf.data graph."""
        return read_in_python(self.read, key)

    def _key(self, text: str) -> str:
        """Return the key of an image by its path as written: relative to the root where it can be."""
        if is_address(text):
            return text
        if is_address(self._root):
            return posixpath.normpath(text)
        return relative_key(Path(self._root), text)

    def _location(self, key: str) -> str:
        """Return the address of an image, or its path on this machine."""
        if is_address(key):
            return key
        if is_address(self._root) and not key.startswith("/"):
            return remote.join(self._root, key)
        return str(Path(self._root) / key)

    def _problem(self, text: str, key: str) -> str | None:
        """Return why a row cannot be used. A file at an address is not looked for: that takes as long as reading it."""
        location = self._location(key)
        return None if is_address(location) or Path(location).is_file() else f"there is no file {text}"

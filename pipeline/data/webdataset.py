"""Tar shards of webdataset as an input of packing: `KEY.jpg` beside `KEY.cls`, `KEY.json` or `KEY.txt`."""

import json
import lzma
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.data.image_files import IMAGE_SUFFIXES, is_hidden
from pipeline.data.input_files import FilesInput, InputFile, find_files
from pipeline.data.inspection import packable
from pipeline.data.pack_inputs import PackRecord
from pipeline.data.sources.base import index_classes
from pipeline.data.sources.servers import short_message
from pipeline.errors import DataError

SUFFIXES = (".tar", ".tar.gz", ".tgz")
LABELS = ("cls", "json", "txt")  # extensions, in this order
LABEL = "label"  # field of the JSON file
CHUNK = 2**20  # bytes
NO_NUMBER = -1  # label of an image whose label is a text


class _Sample(NamedTuple):
    """The files of a shard that share their name up to the first dot."""

    number: int
    key: str
    members: Mapping[str, bytes]
    """By the rest of the name, in lower case."""


class _TarInfo(tarfile.TarInfo):
    """A header whose damage is an error; tarfile takes a damaged header after the first one for the end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_TarInfo":
        """Read the next header."""
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # the two blocks of zeros that every archive ends with
                raise
            raise tarfile.ReadError(f"{error}, at byte {tar.offset:,}; the end is missing") from None


class WebDatasetInput(FilesInput):
    """Tar shards, as an input of packing.

    The label of an image is the text of `KEY.cls`, else the field `label` of `KEY.json`, else the text of `KEY.txt`.
    Labels are classes as in a CSV file, unless class names are given: then they are numbers.
    """

    option = "--webdataset"

    def __init__(
        self,
        patterns: Sequence[str],
        features: Mapping[str, str],
        class_names: Sequence[str] | None,
        first_label: int | None,
    ) -> None:
        """Find the shards.

        Args:
            patterns: See `find_files`; a folder stands for its tar files. Where no split is given, a file is of the
                split that its name begins with.
            features: image: extension of the images, where there are several; label: extension of a text, or field of
                the JSON file; class_name: the same for the name of the class.
            class_names: See `FilesInput`.
            first_label: See `FilesInput`.

        Raises:
            DataError: There is no such file.
        """
        super().__init__(find_files(self.option, patterns, SUFFIXES, split_by_name=True), class_names, first_label)
        self._features = features
        self.identity["features"] = dict(features)

    def read_file(self, file: InputFile, skip: int) -> Iterator[PackRecord]:
        """Yield the images of a shard, from number `skip` on."""
        for sample in self._samples(file, skip):
            if sample.number >= skip:
                yield self._to_record(file, sample)

    def classes(self, rows: pa.Table) -> tuple[tuple[str, ...], np.ndarray]:
        """Return the class names in the order of the labels."""
        if self._names or "class_name" in self._features:
            return super().classes(rows)
        names, labels = index_classes(rows["class_name"].to_pylist())
        return names, np.array(labels, np.int32)

    def _samples(self, file: InputFile, skip: int) -> Iterator[_Sample]:
        """Yield the samples of a shard: consecutive files of one name. Of the first `skip`, no contents are read."""
        sample: _Sample | None = None
        members: dict[str, bytes] = {}
        try:
            with tarfile.open(self.local_path(file), tarinfo=_TarInfo) as tar:
                for member in tar:
                    folder, _, name = member.name.rpartition("/")
                    if not member.isfile() or is_hidden(name):
                        continue
                    stem, _, extension = name.partition(".")
                    key = f"{folder}/{stem}" if folder else stem
                    if sample is None or sample.key != key:
                        if sample is not None:
                            yield sample
                        members = {}
                        sample = _Sample(0 if sample is None else sample.number + 1, key, members)
                    if extension.lower() in members:
                        raise DataError(f"{file.address}: sample {key} has {extension} twice")
                    content = tar.extractfile(member) if sample.number >= skip and self._is_used(extension) else None
                    members[extension.lower()] = b"" if content is None else content.read()
                _check_rest(tar)
        except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            where = "its first sample" if sample is None else f"sample {sample.key}"
            raise DataError(f"{file.address} is damaged at or after {where}: {short_message(error)}") from None
        if sample is not None:
            yield sample

    def _is_used(self, extension: str) -> bool:
        """Return whether files of an extension may be images, labels or names of classes."""
        return extension.lower() in (*LABELS, *self._features.values()) or f".{extension.lower()}" in IMAGE_SUFFIXES

    def _to_record(self, file: InputFile, sample: _Sample) -> PackRecord:
        where, members = f"{file.address}: sample {sample.key}", sample.members
        images = [name for name in members if f".{name}" in IMAGE_SUFFIXES]
        image = self._features.get("image", images[0] if len(images) == 1 else "")
        if not members.get(image):
            fault = "several images" if len(images) > 1 else "no image"
            remedy = "; --image-feature names one" if len(images) > 1 or image else ""
            raise DataError(f"{where} has {fault}{f' {image}' if image else ''}; it has {', '.join(members)}{remedy}")
        text = self._text(members, self._features.get("label"), where)
        if text is None:
            wanted = self._features.get("label") or f"cls, json with the field {LABEL}, or txt"
            raise DataError(
                f"{where} has no label; it has {', '.join(members)}, and needs {wanted}: --label-feature names another "
                "extension, or field of json"
            )
        number = int(text.partition(".")[0]) if _is_number(text) else NO_NUMBER
        name: str | None = text
        if self._names or "class_name" in self._features:
            if number == NO_NUMBER:
                raise DataError(f"{where} has the label {text!r}, which is no number; leave out the class names")
            self.check_label(number, where)
        if "class_name" in self._features:
            name = self._text(members, self._features["class_name"], where)
        key = f"{file.name}/{sample.number}/{sample.key}.{image}"
        return PackRecord(key, number, name, file.split, 0, packable(members[image]))

    def _text(self, members: Mapping[str, bytes], name: str | None, where: str) -> str | None:
        """Return the text of a member of this extension, or of a field of the JSON file; None if there is none.

        Args:
            members: Of the sample.
            name: Extension or field; None for that of a label.
            where: Names the sample, for messages.
        """
        extension = next((each for each in LABELS if each in members), "") if name is None else name
        field = LABEL if name is None else name
        try:
            if extension in members and extension != "json":
                return members[extension].decode().strip() or None
            if "json" not in members:
                return None
            fields = json.loads(members["json"])
            value: Any = fields.get(field) if isinstance(fields, dict) else None
        except ValueError as error:
            raise DataError(f"{where} has a file that cannot be read: {short_message(error)}") from None
        if name is None and value is None and "txt" in members:
            return members["txt"].decode().strip() or None
        if isinstance(value, dict | list):
            raise DataError(f"{where}: {field} in its json is no text and no number: {str(value)[:80]}")
        return None if value is None else str(value).strip() or None


def _check_rest(tar: tarfile.TarFile) -> None:
    """Check that nothing but zeros follows the end marker; of a compressed file, its checksum is reached thereby.

    Raises:
        tarfile.ReadError: Something follows, such as a second archive.
        EOFError: The compressed file is cut short.
    """
    assert tar.fileobj is not None  # the archive is open
    while rest := tar.fileobj.read(CHUNK):
        if rest.strip(b"\0"):
            raise tarfile.ReadError("more follows its end marker, such as a second archive: unpack it and pack it anew")


def _is_number(text: str) -> bool:
    """Return whether a text is an integer that is a label: 1 or 1.0."""
    whole, _, rest = text.partition(".")
    return whole.isascii() and whole.isdigit() and not rest.strip("0")

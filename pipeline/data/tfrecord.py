"""TFRecord files of tf.train.Example as an input of packing."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from pipeline.console import plural
from pipeline.data.input_files import FilesInput, InputFile, find_files
from pipeline.data.inspection import packable, tensorflow_reason
from pipeline.data.pack_inputs import PackRecord
from pipeline.errors import DataError


class FeatureNames(NamedTuple):
    """The names of an Example's features."""

    image: str
    """The encoded file."""
    label: str
    """A number."""
    class_name: str | None
    """Text; None where there is none."""


LAYOUTS = (
    FeatureNames("image/encoded", "image/class/label", "image/class/text"),  # the TPU's ImageNet
    FeatureNames("image", "label", None),  # tensorflow-datasets
)
FILE_NAME = "image/filename"  # goes into the key where there is one


class TFRecordInput(FilesInput):
    """Uncompressed TFRecord files of tf.train.Example, as an input of packing."""

    option = "--tfrecord"

    def __init__(
        self,
        patterns: Sequence[str],
        features: Mapping[str, str],
        class_names: Sequence[str] | None,
        first_label: int | None,
    ) -> None:
        """Find the files and inspect the first record.

        Args:
            patterns: See `find_files`.
            features: Names of the features that differ from LAYOUTS.
            class_names: See `FilesInput`.
            first_label: See `FilesInput`.

        Raises:
            DataError: There is no such file, or its records have an unknown layout.
        """
        super().__init__(find_files(self.option, patterns), class_names, first_label)
        file, record = next(((file, record) for file in self._files for record in self._records(file, 0)), (None, b""))
        if file is None:
            raise DataError(f"--tfrecord: {plural(len(self._files), 'file')} without a record")
        example = _parse(record)
        layout = next((layout for layout in LAYOUTS if {layout.image, layout.label} <= set(example)), LAYOUTS[0])
        self._features = layout._replace(**features)
        self._to_record(file, 0, example)
        if class_names is None and self._features.class_name not in example:
            raise DataError(
                f"{file.address}: record 0 has no {self._features.class_name or 'text'} to call its class by (it has "
                f"{', '.join(sorted(example))});\n"
                "give --classes FILE with a name a line, such as the label.labels.txt of tensorflow-datasets, or "
                "--class-feature NAME"
            )
        self.identity["features"] = " ".join(filter(None, self._features))

    def read_file(self, file: InputFile, skip: int) -> Iterator[PackRecord]:
        """Yield the images of a file, from record `skip` on."""
        for number, record in enumerate(self._records(file, skip), skip):
            yield self._to_record(file, number, _parse(record))

    def _records(self, file: InputFile, skip: int) -> Iterator[bytes]:
        try:
            yield from tf.data.TFRecordDataset(str(self.local_path(file))).skip(skip).as_numpy_iterator()
        except tf.errors.OpError as error:
            raise DataError(
                f"{file.address} is damaged, or no uncompressed TFRecord file: {tensorflow_reason(error)}"
            ) from None

    def _to_record(self, file: InputFile, number: int, example: Mapping[str, Any]) -> PackRecord:
        where, features = f"{file.address}: record {number}", self._features
        image, labels = example.get(features.image), example.get(features.label)
        if not image or not isinstance(image[0], bytes) or not labels or not isinstance(labels[0], int):
            raise DataError(
                f"{where} has no bytes {features.image} or no number {features.label}; it has "
                f"{', '.join(sorted(example)) or 'nothing'}: give their names with --image-feature and --label-feature"
            )
        if len(image) + len(labels) > 2:
            raise DataError(
                f"{where} has {plural(len(image), 'image')} and {plural(len(labels), 'label')}; needed is one of each"
            )
        self.check_label(labels[0], where)
        class_name, own = (_text(example.get(name), where) for name in (features.class_name or "", FILE_NAME))
        return PackRecord(
            f"{file.name}/{number}" + (f"/{own}" if own else ""),
            labels[0],
            class_name,
            file.split,
            0,
            packable(image[0]),
        )


def _parse(record: bytes) -> dict[str, list[Any]]:
    """Return the features of an Example by name; none if the record is not an Example."""
    try:
        features = tf.train.Example.FromString(record).features.feature
    except Exception:  # protobuf's own, of a package that is not among the dependencies
        return {}
    kinds = ((name, feature, feature.WhichOneof("kind")) for name, feature in features.items())
    return {name: list(getattr(feature, kind).value) for name, feature, kind in kinds if kind}


def _text(values: list[Any] | None, where: str) -> str | None:
    if not values or not isinstance(values[0], bytes):
        return None
    try:
        return values[0].decode()
    except UnicodeDecodeError:
        raise DataError(f"{where} has text that is not UTF-8: {values[0][:40]!r}") from None

"""Images from tensorflow-datasets, by random access to files prepared as ArrayRecord."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow as tf

from pipeline.data.sources.base import DatasetNotDownloadedError, LabeledImage, read_in_python, split_of
from pipeline.data.sources.servers import REACH_SECONDS, short_message, unreachable
from pipeline.errors import DataError


@dataclass(frozen=True)
class TfdsSource:
    """A prepared data set with the features image and label."""

    class_names: tuple[str, ...]
    records: Mapping[str, Sequence[Any]]
    """Examples per split, by the data set's own split names, images still encoded."""

    def list_images(self) -> list[LabeledImage]:
        """List all images, always in the same order."""
        return [
            LabeledImage(f"{name}/{i}", int(example["label"]), split_of(name))
            for name, examples in self.records.items()
            for i, example in enumerate(examples)
        ]

    def stat(self, key: str) -> None:
        """Return None: there is no file whose size and version could tell that an image has changed."""

    def read(self, key: str) -> bytes:
        """Return the encoded file of an image."""
        name, _, position = key.rpartition("/")
        return self.records[name][int(position)]["image"]

    def read_tf(self, key: tf.Tensor) -> tf.Tensor:
        """Return the encoded file of an image in a tf.data graph."""
        return read_in_python(self.read, key)


def open_tfds(name: str, data_dir: Path, *, download: bool) -> TfdsSource:
    """Open a data set.

    Args:
        name: As in tensorflow-datasets, `cifar10` or `<data set>/<configuration>`.
        data_dir: Data folder of tensorflow-datasets.
        download: Whether to download and prepare the data set if it is not on this machine yet.

    Raises:
        DatasetNotDownloadedError: The data set is not on this machine yet and `download` is False.
        DataError: There is no such data set, it cannot be downloaded, or it does not hold labeled images.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except Exception as error:
        known = tfds.list_builders(with_community_datasets=False)
        if name.partition("/")[0].partition(":")[0] in known:
            raise DataError(f"data.name: {name}: {short_message(error)}") from error
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; {data_dir} does not hold it either"
        raise DataError(f"data.name: tensorflow-datasets has no data set {name!r}{hint}") from None
    features = dict(builder.info.features.items())
    if not isinstance(features.get("image"), tfds.features.Image) or not isinstance(
        features.get("label"), tfds.features.ClassLabel
    ):
        raise DataError(
            f"data.name: {name} has the features {', '.join(features)}; needed are an image named image and a class "
            "named label"
        )
    if not builder.is_prepared():
        if not download:
            raise DatasetNotDownloadedError(f"{name} is not in {data_dir} yet", tuple(features["label"].names))
        _prepare(builder, name, data_dir)

    splits = [split for split in builder.info.splits if split_of(split) is not None]
    if not splits:
        raise DataError(f"data.name: {name} has only the splits {', '.join(builder.info.splits)}; needed is train")
    still_encoded = {
        key: tfds.decode.SkipDecoding() for key, feature in features.items() if isinstance(feature, tfds.features.Image)
    }
    try:
        records = {split: builder.as_data_source(split, decoders=still_encoded) for split in splits}
    except NotImplementedError:
        raise DataError(
            f"{builder.data_path} is prepared as {builder.info.file_format.value}, which cannot be read in any order.\n"
            f"Delete that folder or set data.path to another: {name} is then prepared anew, as array_record.\n"
            "A data set of your own: write it with file_format='array_record'."
        ) from None
    return TfdsSource(tuple(features["label"].names), records)


def _prepare(builder: Any, name: str, data_dir: Path) -> None:
    import tensorflow_datasets as tfds

    ways_on = (
        "Two ways on:\n"
        "  - train on an image folder: data.source=folder data.name=null data.path=FOLDER (with "
        "FOLDER/<class>/<image>)\n"
        "  - prepare it where there is a network, then point data.path at the copied DIR:\n"
        '      python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', data_dir='DIR').download_and_prepare(file_format='array_record')\""
    )
    # Where files are downloaded by hand, the addresses are where people get them, and the error says how.
    by_hand = builder.MANUAL_DOWNLOAD_INSTRUCTIONS is not None
    silent = (
        {} if by_hand else unreachable(set(builder.url_infos) - _downloaded_urls(data_dir / "downloads"), REACH_SECONDS)
    )
    if silent:
        lines = "\n".join(f"  {url}: {reason}" for url, reason in silent.items())
        raise DataError(f"The data set {name} could not be fetched:\n{lines}\n{ways_on}")
    try:
        builder.download_and_prepare(
            file_format="array_record", download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    except Exception as error:  # whatever its downloaders and parsers raise
        raise DataError(f"tensorflow-datasets could not prepare {name}: {short_message(error)}\n{ways_on}") from error


def _downloaded_urls(downloads: Path) -> set[str]:
    """Return the URLs of the downloaded files; each file has its URLs in an .INFO file."""
    return {url for info in downloads.rglob("*.INFO") for url in json.loads(info.read_text()).get("urls", ())}

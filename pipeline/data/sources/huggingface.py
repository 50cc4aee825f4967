"""Images of a data set of Hugging Face's library `datasets`: from the Hub, or from a folder on this machine.

The library keeps a data set as Arrow files, which are mapped from the disk: an image is read by its number. An image of
a folder is stored as the path of its file, any other as the bytes of its file.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import tensorflow as tf

from pipeline.config.data import DataConfig
from pipeline.console import install_command
from pipeline.data.sources.base import (
    CorruptImageError,
    DatasetNotDownloadedError,
    FileStat,
    LabeledImage,
    index_classes,
    read_in_python,
    split_of,
)
from pipeline.data.sources.files import file_stat, version_of
from pipeline.data.sources.servers import REACH_SECONDS, short_message, unreachable
from pipeline.errors import DataError, suggest

IMAGE_FIELDS = {"bytes", "path"}  # of an image in Arrow
SAVED = ("dataset_dict.json", "state.json")  # one of them lies in a folder that save_to_disk wrote
LABEL = "label"  # preferred where several columns may hold the labels


class HuggingFaceSource:
    """The images of a data set; it may be read from several threads."""

    def __init__(
        self,
        class_names: tuple[str, ...],
        images: Mapping[str, Any],
        labels: Mapping[str, list[int]],
        versions: Mapping[str, int],
    ) -> None:
        """Create the source.

        Args:
            class_names: In the order of the labels.
            images: Data sets by split, with the column of the images alone, in the format arrow.
            labels: Label of each row by split; -1 where the data have none.
            versions: Version of the Arrow files by split, for FileStat.
        """
        self.class_names = class_names
        self._images, self._labels, self._versions = images, labels, versions

    def list_images(self) -> list[LabeledImage]:
        """List all images, always in the same order."""
        return [
            LabeledImage(f"{split}/{i}" + (f"/{name}" if name else ""), label, split_of(split))
            for split, data in self._images.items()
            for i, (label, name) in enumerate(zip(self._labels[split], _file_names(data), strict=True))
        ]

    def stat(self, key: str) -> FileStat | None:
        """Return the size and version of an image's file, or of its bytes within the Arrow file."""
        split, row = self._row(key)
        if row["bytes"].is_valid:
            return FileStat(row["bytes"].as_buffer().size, self._versions[split])
        return file_stat(Path(row["path"].as_py())) if row["path"].is_valid else None

    def read(self, key: str) -> bytes:
        """Return the encoded file of an image."""
        _, row = self._row(key)
        if row["bytes"].is_valid:
            return row["bytes"].as_py()
        if not row["path"].is_valid:
            raise CorruptImageError(key, "is empty: its row has no image")
        return Path(row["path"].as_py()).read_bytes()

    def read_tf(self, key: tf.Tensor) -> tf.Tensor:
        """Return the encoded file of an image in a tf.data graph."""
        return read_in_python(self.read, key)

    def _row(self, key: str) -> tuple[str, Mapping[str, Any]]:
        """Return the split of an image, and its bytes and path as scalars of Arrow."""
        split, position = key.split("/")[:2]
        image = self._images[split][int(position)].column(0)[0]
        return split, image if image.is_valid else dict.fromkeys(IMAGE_FIELDS, image)


def open_huggingface(config: DataConfig, *, download: bool) -> HuggingFaceSource:
    """Open a data set.

    Args:
        config: `name` or `path`, `config_name`, `revision` and `columns` are used.
        download: Whether to download a data set of the Hub that is not on this machine yet.

    Raises:
        DatasetNotDownloadedError: The data set is not on this machine yet and `download` is False.
        DataError: The library is not installed; there is no such data set, it cannot be downloaded, or it does not hold
            labeled images.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"data.source: huggingface needs the package datasets, which is not installed: "
            f"{install_command('huggingface')}"
        ) from None

    loaded = _load_folder(config.path, config) if config.path is not None else _load_from_hub(config, download)
    if isinstance(loaded, datasets.Dataset):
        loaded = {str(loaded.split or "train"): loaded}
    where = _name(config)
    splits = [split for split in loaded if split_of(split) is not None]
    if not splits:
        raise DataError(f"{where} has only the splits {', '.join(loaded)}; needed is train")
    if len({split_of(split) for split in splits}) < len(splits):
        raise DataError(f"{where} has one split under two names: {', '.join(splits)}")
    features = loaded[splits[0]].features
    image, label = _image_column(features, config), _label_column(features, config)
    if any(loaded[split].features.get(name) != features[name] for split in splits for name in (image, label)):
        raise DataError(f"{where}: the column {image!r} or {label!r} is not of one kind in {', '.join(splits)}")
    images = {
        split: loaded[split]
        .select_columns([image])
        .cast_column(image, datasets.Image(decode=False))
        .with_format("arrow")
        for split in splits
    }
    values = {split: loaded[split].select_columns([label]).with_format("arrow")[:][label] for split in splits}
    class_names, labels = _labels(features[label], {split: column.to_pylist() for split, column in values.items()})
    return HuggingFaceSource(class_names, images, labels, {split: _version(loaded[split]) for split in splits})


def _name(config: DataConfig) -> str:
    """Return the key of the config that names the data set, and its value."""
    return f"data.name: {config.name}" if config.path is None else f"data.path: {config.path}"


def _labels(feature: Any, columns: Mapping[str, list[Any]]) -> tuple[tuple[str, ...], dict[str, list[int]]]:
    """Return the class names, and the labels by split; -1 where a row has none."""
    if names := getattr(feature, "names", None):
        return tuple(names), {
            split: [-1 if value is None else value for value in col] for split, col in columns.items()
        }
    texts = [str(value) for column in columns.values() for value in column if value is not None]
    class_names, indices = index_classes(texts)
    index = dict(zip(texts, indices, strict=True))
    return class_names, {split: [index.get(str(value), -1) for value in column] for split, column in columns.items()}


def _load_folder(path: Path, config: DataConfig) -> Any:
    """Load a folder that `save_to_disk` wrote, or that holds images or files such as Parquet."""
    import datasets

    if not path.is_dir():
        raise DataError(
            f"data.path: {path} is {'a file, not a folder' if path.exists() else 'missing'}; give a folder that the "
            "library datasets loads, or data.name=ID for a data set on the Hugging Face Hub"
        )
    try:
        if any((path / name).is_file() for name in SAVED):
            return datasets.load_from_disk(str(path))
        builder = datasets.load_dataset_builder(str(path.resolve()), config.config_name)
        builder.download_and_prepare()
        return builder.as_dataset()
    except Exception as error:  # whatever its parsers raise
        raise _explain(f"data.path: {path} cannot be loaded", error) from error


def _load_from_hub(config: DataConfig, download: bool) -> Any:
    """Load a data set of the Hub, from the library's cache if the Hub cannot be reached."""
    import datasets

    name = config.name or ""
    if Path(name).exists():
        raise DataError(
            f"data.name: the library takes {name} for the folder of that name here; give data.name=null "
            f"data.path={name}, or start the command elsewhere"
        )
    offline = datasets.config.HF_HUB_OFFLINE
    silent = {} if offline else unreachable([datasets.config.HF_ENDPOINT], REACH_SECONDS)
    reason = "; ".join(f"{url}: {reason}" for url, reason in silent.items()) or "HF_HUB_OFFLINE is set"
    with _offline(bool(silent)):
        try:
            builder = datasets.load_dataset_builder(name, config.config_name, revision=config.revision)
            if (offline or silent) and config.revision not in (None, (commit := Path(builder.cache_dir).name)):
                raise DataError(
                    f"data.revision: the Hugging Face Hub cannot be reached ({reason}), and the latest copy of {name} "
                    f"in {datasets.config.HF_DATASETS_CACHE} is of commit {commit}; set data.revision to that, or null"
                )
            if not Path(builder.cache_dir).is_dir():
                if not download:
                    raise _not_downloaded(builder.info.features, config)
                builder.download_and_prepare()
            return builder.as_dataset()
        except DataError:
            raise
        except datasets.exceptions.DatasetNotFoundError as error:
            raise DataError(
                f"data.name: the Hugging Face Hub has no data set {name!r}, or it needs a login (hf auth login); an id "
                f"is written OWNER/NAME, as in ethz/food101. {short_message(error)}"
            ) from None
        except Exception as error:  # whatever its downloaders and parsers raise
            if not silent and not offline:
                raise _explain(f"data.name: {name} could not be downloaded", error) from error
            raise DataError(
                f"data.name: {name} is not in {datasets.config.HF_DATASETS_CACHE}, and the Hugging Face Hub cannot be "
                f"reached ({reason}).\n"
                "Two ways on: copy that folder from a machine that has downloaded the data set; or download the data "
                "set's files there, and give their folder here as data.name=null data.path=FOLDER"
            ) from None


def _not_downloaded(features: Any, config: DataConfig) -> DataError:
    """Return the error for a data set that is known and not downloaded."""
    import datasets

    message = f"{config.name} is not in {datasets.config.HF_DATASETS_CACHE} yet"
    if features is not None:
        feature = features[_label_column(features, config)]
        if isinstance(feature, datasets.ClassLabel):
            return DatasetNotDownloadedError(message, tuple(feature.names))
    return DataError(f"data.name: {message}, and its classes are known only with its data; training downloads it")


@contextmanager
def _offline(offline: bool) -> Iterator[None]:
    """Keep the library from the network during the block, if `offline` is true.

    It would try again and again, for 20 seconds or more, before it looks into its cache.
    """
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    try:
        if offline:
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _explain(what: str, error: Exception) -> DataError:
    """Return the error of the library as one of the data, with the reason that lies deepest."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    message = short_message(error if isinstance(error, ValueError) else cause)
    hint = (
        "; set data.config_name to one of them"
        if "config" in message.lower() and "available" in message.lower()
        else ""
    )
    return DataError(f"{what}: {message}{hint}")


def _image_column(features: Mapping[str, Any], config: DataConfig) -> str:
    import datasets

    where = _name(config)

    def holds_files(feature: Any) -> bool:
        if isinstance(feature, datasets.Value):
            return "binary" in feature.dtype
        return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == IMAGE_FIELDS)

    if (name := config.columns.image) is not None:
        if name not in features or not holds_files(features[name]):
            fault = "holds no image files" if name in features else "does not exist"
            raise DataError(f"{where}: data.columns.image: the column {name!r} {fault}{suggest(name, features)}")
        return name
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    found = found or [name for name, feature in features.items() if holds_files(feature)]
    if len(found) != 1:
        raise DataError(
            f"{where} has {'several columns' if found else 'no column'} of images among {', '.join(features)}; "
            "name it by data.columns.image"
        )
    return found[0]


def _label_column(features: Mapping[str, Any], config: DataConfig) -> str:
    import datasets

    where = _name(config)
    if (name := config.columns.label) is None:
        classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        name = classes[0] if len(classes) == 1 else LABEL
        if name not in features or (classes and name not in classes):
            among = classes or list(features)
            raise DataError(
                f"{where}: it is not clear which column holds the labels; set data.columns.label to one of "
                f"{', '.join(among)}"
            )
    if name not in features:
        raise DataError(f"{where}: data.columns.label: the column {name!r} does not exist{suggest(name, features)}")
    if not isinstance(features[name], datasets.ClassLabel | datasets.Value):
        raise DataError(
            f"{where}: the column {name!r} holds {type(features[name]).__name__}, not one label per image; "
            "data.columns.label names another"
        )
    return name


def _file_names(data: Any) -> list[str | None]:
    """Return the name of the file of each image, without folders, where it has one."""
    paths = pc.struct_field(data[:].column(0), "path").to_pylist()
    return [path and path.rpartition("/")[2] for path in paths]


def _version(data: Any) -> int:
    """Return a version of the Arrow files that a split lies in."""
    files = (file_stat(Path(file["filename"])) for file in data.cache_files)
    return version_of(" ".join([data._fingerprint, *map(str, files)]))

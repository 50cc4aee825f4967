"""Labeled data that a network was not trained on, and the alignment of their classes with the network's outputs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import tensorflow as tf

from pipeline.config.data import Background, DataConfig
from pipeline.console import ProgressFn, plural
from pipeline.data.manifest import Manifest
from pipeline.data.sources.base import DataSource, FileStat, LabeledImage, format_list
from pipeline.data.sources.catalog import open_source
from pipeline.data.sources.pack import METADATA_FILE
from pipeline.data.validation import scan
from pipeline.errors import DataError, suggest
from pipeline.evaluation.predictor import Predictions
from pipeline.models.head_transfer import match_classes

SPLIT = "test"  # of every row of the manifest: the data are not used for training


@dataclass(frozen=True)
class SplitSource:
    """The images of a data set, or of one of its splits, as one set without splits.

    Attributes:
        source: The data set.
        split: The split to take; None takes all images.
    """

    source: DataSource
    split: str | None

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class names of the data set."""
        return self.source.class_names

    def list_images(self) -> list[LabeledImage]:
        """Return the samples of the split, without the split."""
        return [
            sample._replace(split=None) for sample in self.source.list_images() if self.split in (None, sample.split)
        ]

    def stat(self, key: str) -> FileStat | None:
        """Return size and time of an image file."""
        return self.source.stat(key)

    def read(self, key: str) -> bytes:
        """Read the encoded image."""
        return self.source.read(key)

    def read_tf(self, key: tf.Tensor) -> tf.Tensor:
        """Read the encoded image in a TensorFlow graph."""
        return self.source.read_tf(key)


def open_external_data(
    path: Path, split: str | None, background: Background = "white"
) -> tuple[SplitSource, DataConfig]:
    """Open a folder, a CSV file or a pack of images for evaluation, as one set.

    Args:
        path: A folder, a CSV file (recognized by its suffix), or the folder of a pack; the layouts are those of the
            training data.
        split: The split of the data to take; None takes all images.
        background: Color behind transparent pixels.

    Returns:
        The images, and the config to scan them with.

    Raises:
        DataError: The layout is not recognized, or the data have no such split.
    """
    folder_source = "pack" if (path / METADATA_FILE).is_file() else "folder"
    config = DataConfig(
        source="csv" if path.suffix.lower() == ".csv" else folder_source,
        path=path,
        group_near_duplicates=False,
        background=background,
    )
    source = SplitSource(open_source(config), split)
    if split is not None and not source.list_images():
        raise DataError(f"{path}: the data have no split {split}; omit --split to evaluate all images")
    return source, config


def scan_external_data(source: SplitSource, config: DataConfig, progress: ProgressFn) -> Manifest:
    """Read and decode every image, as before training; all of them belong to the split `SPLIT`.

    Raises:
        DataError: Images cannot be read; the message names all of them.
    """
    manifest = scan(source, config, seed=0, progress=progress, min_classes=1, full_dataset=source.split is None)
    return replace(manifest, table=manifest.table.assign(split=SPLIT), notes=())


def seen_in_training(trained: Manifest, sha256: pd.Series) -> int:
    """Count the images that are, byte for byte, among the training images of a run.

    Args:
        trained: Manifest of the run.
        sha256: Digest of each image's file, hexadecimal.
    """
    return int(sha256.isin(trained.table["sha256"].iloc[trained.indices("train")]).sum())


@dataclass(frozen=True, eq=False)
class Alignment:
    """The classes of an evaluation: all classes of the network, with those that the data merge counted as one.

    Attributes:
        class_names: K names, in the order of the network's outputs.
        rows: For each of them, its outputs of the network: one, or those that are merged.
        labels: For each class of the data, its position among the K, int32.
    """

    class_names: tuple[str, ...]
    rows: tuple[tuple[int, ...], ...]
    labels: np.ndarray

    def __call__(self, predictions: Predictions) -> Predictions:
        """Map labels of the data and logits (N, K_old) to these K classes; merging adds probabilities."""
        merges = any(len(row) > 1 for row in self.rows)
        logits = predictions.logits
        if merges:
            logits = predictions.task.merge_logits(logits, self.rows).astype(np.float32)
        return replace(predictions, labels=self.labels[predictions.labels], logits=logits)


def align(
    data_classes: Sequence[str], class_lists: Sequence[Sequence[str]], class_map: Path | None = None
) -> Alignment:
    """Find the outputs of every class of the data by name, or by a class map as in `pipeline.models.head_transfer`.

    Args:
        data_classes: In the order of the data's labels.
        class_lists: Names of the network's outputs, in their order; a list for each naming.
        class_map: A file that maps classes of the data to classes of the network.

    Raises:
        WeightsError: The class map cannot be read or names unknown classes.
        DataError: A class of the data has no output, or shares one with another; the message names all of them.
    """
    match = match_classes(data_classes, class_lists, class_map)
    if match.new:
        known = [name for names in class_lists for name in names]
        unmatched = [
            f"{name} may mean {' or '.join(match.ambiguous[name])}"
            if name in match.ambiguous
            else name + suggest(name, known)
            for name in match.new
        ]
        raise DataError(
            f"{len(unmatched)} of the data's {plural(len(data_classes), 'class', 'classes')} are not among the model's "
            f"{len(class_lists[0])}:\n{format_list(unmatched)}\n"
            "Rename them as in the model, or map them with --class-map FILE (YAML, data's class: model's class)."
        )
    titles = [" ".join(names) for names in zip(*class_lists, strict=True)]
    owner: dict[int, int] = {}
    for label, row in enumerate(match.rows):
        for index in row:
            if owner.setdefault(index, label) != label:
                raise DataError(
                    f"{data_classes[owner[index]]} and {data_classes[label]} both match the model's class "
                    f"{titles[index]}; merge their images into one class"
                )
    rows = [*match.rows, *((index,) for index in range(len(titles)) if index not in owner)]
    rows.sort(key=min)
    position = {row: number for number, row in enumerate(rows)}
    merged = {row: name for name, row in zip(data_classes, match.rows, strict=True) if len(row) > 1}
    names = tuple(merged.get(row, titles[row[0]]) for row in rows)
    return Alignment(names, tuple(rows), np.array([position[row] for row in match.rows], np.int32))

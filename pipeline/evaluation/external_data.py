"""Labelled data beside a network whose classes were not made from them: which of its outputs stand for which of their classes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tensorflow as tf

from pipeline.config.data import DataConfig
from pipeline.data.manifest import Manifest
from pipeline.data.sources.base import DataSource, FileStat, Sample, format_list
from pipeline.data.sources.catalog import open_source
from pipeline.data.sources.pack import DESCRIPTION
from pipeline.data.validation import scan
from pipeline.errors import DataError, suggest
from pipeline.evaluation.metrics import Predictions
from pipeline.models.head_transfer import match_classes, merge_logits, read_class_map

SPLIT = "test"  # of every row of the manifest: nothing here is trained on


@dataclass(frozen=True)
class SplitSource:
    """The pictures of a data set, or of one of the splits that it brings, as one set without splits."""

    whole: DataSource
    split: str | None

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.whole.class_names

    def samples(self) -> list[Sample]:
        return [sample._replace(split=None) for sample in self.whole.samples() if self.split in (None, sample.split)]

    def stat(self, key: str) -> FileStat | None:
        return self.whole.stat(key)

    def read(self, key: str) -> bytes:
        return self.whole.read(key)

    def read_tf(self, key: tf.Tensor) -> tf.Tensor:
        return self.whole.read_tf(key)


def open_external_data(path: Path, split: str | None) -> tuple[SplitSource, DataConfig]:
    """Opens a folder, a CSV file or a pack of pictures to be measured, as one set.

    Args:
        path: A folder, a CSV file by its suffix, or the folder of a pack; the layouts are those of training's data.
        split: Takes only this one of the splits that the data bring; None takes all pictures.

    Returns:
        The pictures, and what to scan them by.

    Raises:
        DataError: The layout is not understood, or the data bring no such split.
    """
    folder = "pack" if (path / DESCRIPTION).is_file() else "folder"
    config = DataConfig(
        source="csv" if path.suffix.lower() == ".csv" else folder, path=path, group_near_duplicates=False
    )
    part = SplitSource(open_source(config), split)
    if split is not None and not part.samples():
        raise DataError(f"{path}: the data bring no split {split}; leave --split out to measure all pictures")
    return part, config


def scan_external_data(source: SplitSource, config: DataConfig, progress: Callable[[int, int], None]) -> Manifest:
    """Reads and decodes every picture, as training does first; all of them belong to the split `SPLIT`.

    Raises:
        DataError: Pictures cannot be read; all of these are named.
    """
    manifest = scan(source, config, seed=0, progress=progress, fewest_classes=1, whole=source.split is None)
    return replace(manifest, table=manifest.table.assign(split=SPLIT), notes=())


@dataclass(frozen=True, eq=False)
class Alignment:
    """The classes that a network is measured by: all of its own, of which those that the data merge count as one.

    Attributes:
        class_names: K names, in the order of the network's outputs.
        rows: For each of them, its outputs of the network: one, or those that are merged.
        labels: For each class of the data, its place among the K, int32.
    """

    class_names: tuple[str, ...]
    rows: tuple[tuple[int, ...], ...]
    labels: np.ndarray

    def __call__(self, predictions: Predictions) -> Predictions:
        """Takes labels of the data's classes and logits of the network's (N, K_old) to these K. Merging adds probabilities."""
        merges = any(len(row) > 1 for row in self.rows)
        logits = merge_logits(predictions.logits, self.rows).astype(np.float32) if merges else predictions.logits
        return replace(predictions, labels=self.labels[predictions.labels], logits=logits)


def align(
    data_classes: Sequence[str], class_lists: Sequence[Sequence[str]], class_map: Path | None = None
) -> Alignment:
    """Finds the outputs of every class of the data, by name, or by a class map as `pipeline.models.head_transfer` reads it.

    Args:
        data_classes: In the order of the data's labels.
        class_lists: What the network's outputs are called, in their order; a list for each wording.
        class_map: A file that names classes of the network for classes of the data.

    Raises:
        WeightsError: The class map cannot be read or names classes that there are not.
        DataError: A class of the data has no output, or shares one with another; all of these are named.
    """
    mapping = None if class_map is None else read_class_map(class_map)
    match = match_classes(data_classes, class_lists, mapping, origin=str(class_map))
    if match.new:
        known = [name for names in class_lists for name in names]
        told = [
            f"{name} may mean {' or '.join(match.ambiguous[name])}"
            if name in match.ambiguous
            else name + suggest(name, known)
            for name in match.new
        ]
        raise DataError(
            f"{len(told)} of the data's {len(data_classes)} classes are none of the model's {len(class_lists[0])}:\n{format_list(told)}\n"
            "Call them as the model does, or say by --class-map FILE (YAML, data's class: model's class) which they are."
        )
    titles = [" ".join(wordings) for wordings in zip(*class_lists, strict=True)]
    owner: dict[int, int] = {}
    for label, row in enumerate(match.rows):
        for index in row:
            if owner.setdefault(index, label) != label:
                raise DataError(
                    f"{data_classes[owner[index]]} and {data_classes[label]} both stand for the model's class {titles[index]}; "
                    "make one class of their pictures"
                )
    rows = [*match.rows, *((index,) for index in range(len(titles)) if index not in owner)]
    rows.sort(key=min)
    place = {row: number for number, row in enumerate(rows)}
    merged = {row: name for name, row in zip(data_classes, match.rows, strict=True) if len(row) > 1}
    names = tuple(merged.get(row, titles[row[0]]) for row in rows)
    return Alignment(names, tuple(rows), np.array([place[row] for row in match.rows], np.int32))

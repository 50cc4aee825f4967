"""Labels for picture files, through the same preprocessing as training's validation."""

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from rich.console import Group
from rich.table import Table
from rich.text import Text

from pipeline.data.inspection import read_header
from pipeline.data.preprocess import Resize, preprocess

BATCH = 32  # pictures; bounds the memory whatever the number of files


class Label(NamedTuple):
    """A class and how probable the model holds it, in [0, 1]."""

    name: str
    probability: float


@dataclass(frozen=True)
class FilePrediction:
    """What the model sees in one file.

    Attributes:
        path: The file.
        top: The most probable classes, the most probable first; empty where the file could not be read.
        error: Why the file could not be read, else None.
    """

    path: Path
    top: tuple[Label, ...] = ()
    error: str | None = None


def predict_files(
    model: keras.Model, class_names: Sequence[str], paths: Iterable[str | Path], *, resolution: int, resize: Resize, k: int = 5
) -> Iterator[FilePrediction]:
    """Predicts files one batch after the other, in constant memory.

    Args:
        model: float32 (B, R, R, 3) in [0, 255] to float32 logits (B, K).
        class_names: K names, in the order of the logits.
        paths: The picture files.
        resolution: Side R of the model's input, in pixels.
        resize: How a picture becomes a square: as in the model's training.
        k: Classes per picture; all of them where the model has fewer.

    Yields:
        A prediction per file, in the order of `paths`. A file that cannot be read yields its reason.
    """
    scalar = [tf.TensorSpec((), tf.string), tf.TensorSpec((), tf.int32)]
    to_square = tf.function(partial(preprocess, resolution=resolution, resize=resize), input_signature=scalar)

    @tf.function(input_signature=[tf.TensorSpec((None, resolution, resolution, 3), tf.uint8)])
    def forward(images: tf.Tensor) -> tf.Tensor:
        return model(tf.cast(images, tf.float32), training=False)

    remaining = map(Path, paths)
    with ThreadPoolExecutor(min(BATCH, os.cpu_count() or 1)) as pool:
        while batch := list(islice(remaining, BATCH)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PIL's remarks on odd files; what cannot be read is reported
                pictures = list(pool.map(partial(_read, to_square), batch))
            readable = [picture for picture in pictures if not isinstance(picture, str)]
            labels = iter(top_k(forward(np.stack(readable)).numpy(), class_names, k) if readable else ())
            for path, picture in zip(batch, pictures, strict=True):
                yield FilePrediction(path, error=picture) if isinstance(picture, str) else FilePrediction(path, next(labels))


def _read(to_square: tf.types.experimental.PolymorphicFunction, path: Path) -> np.ndarray | str:
    """The file as uint8 (R, R, 3), or why it cannot be read."""
    try:
        encoded = path.read_bytes()
    except OSError as error:
        return f"cannot be opened: {error.strerror}"
    header = read_header(encoded)
    if isinstance(header, str):
        return header
    try:
        with tf.device("CPU:0"):
            return to_square(encoded, header.orientation).numpy()
    except tf.errors.OpError:
        return f"is a damaged {header.kind}"


def top_k(logits: np.ndarray, class_names: Sequence[str], k: int = 5) -> list[tuple[Label, ...]]:
    """The most probable classes of each row, by softmax in float64; of equal ones the first class comes first.

    Args:
        logits: (N, K).
        class_names: K names.
        k: How many; all where there are fewer.

    Returns:
        For each row min(k, K) labels, the most probable first.
    """
    left = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    total = np.exp(left).sum(axis=1)
    rows, ranked = np.arange(len(logits)), []
    for _ in range(min(k, logits.shape[1])):
        classes = left.argmax(axis=1)
        ranked.append(zip(classes.tolist(), (np.exp(left[rows, classes]) / total).tolist(), strict=True))
        left[rows, classes] = -np.inf
    return [tuple(Label(class_names[i], probability) for i, probability in row) for row in zip(*ranked, strict=True)]


def prediction_table(prediction: FilePrediction) -> Group:
    """One file's labels with their probabilities, for the screen."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for label in prediction.top:
        table.add_row(f"  {label.probability:6.1%}", Text("█" * round(20 * label.probability), style="cyan"), Text(label.name))
    failure = [] if prediction.error is None else [Text(f"  {prediction.error}", style="red")]
    return Group(Text(str(prediction.path), style="bold"), *failure, table)

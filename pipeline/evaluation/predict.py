"""Predictions for image files, with the preprocessing of validation, and their output as a table."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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

from pipeline.config.data import Background
from pipeline.data.inspection import make_decodable, size_problem
from pipeline.data.preprocessing import Resize, preprocess
from pipeline.errors import RunError
from pipeline.tasks import SINGLE_LABEL, Task

BATCH_SIZE = 32  # images; the memory holds two batches: one in the model, one being read


class Label(NamedTuple):
    """A class and its predicted probability, in [0, 1]."""

    name: str
    probability: float


@dataclass(frozen=True)
class FilePrediction:
    """The prediction for one file.

    Attributes:
        path: The file.
        top: The most probable classes, the most probable first; empty where the file could not be read.
        error: Reason why the file could not be read, else None.
    """

    path: Path
    top: tuple[Label, ...] = ()
    error: str | None = None


def predict_files(
    model: keras.Model,
    class_names: Sequence[str],
    paths: Iterable[str | Path],
    *,
    resolution: int,
    resize: Resize,
    background: Background = "white",
    k: int = 5,
    task: Task = SINGLE_LABEL,
) -> Iterator[FilePrediction]:
    """Predict files batch by batch, in constant memory. While the model runs on one batch, the next one is read.

    Args:
        model: float32 (B, R, R, 3) in [0, 255] to float32 logits (B, K).
        class_names: K names, in the order of the logits.
        paths: The image files.
        resolution: Side R of the model's input, in pixels.
        resize: Method of resizing an image to a square, as in the training of the model.
        background: Color behind transparent pixels, as in the training of the model.
        k: Number of classes per image; all of them where the model has fewer.
        task: What the logits mean.

    Yields:
        A prediction per file, in the order of `paths`; the reason where a file cannot be read.

    Raises:
        RunError: If a logit is not finite.
    """
    scalar = [tf.TensorSpec((), tf.string), tf.TensorSpec((), tf.int32)]
    preprocess_fn = tf.function(partial(preprocess, resolution=resolution, resize=resize), input_signature=scalar)
    to_square = partial(_to_square, preprocess_fn, background)

    @tf.function(input_signature=[tf.TensorSpec(model.input_shape, tf.uint8)])
    def forward(images: tf.Tensor) -> tf.Tensor:
        return model(tf.cast(images, tf.float32), training=False)

    remaining = map(Path, paths)
    with ThreadPoolExecutor(min(BATCH_SIZE, os.cpu_count() or 1)) as pool:

        def submit_batch() -> list[tuple[Path, Future[np.ndarray | str]]]:
            return [(path, pool.submit(_read, to_square, path)) for path in islice(remaining, BATCH_SIZE)]

        pending = submit_batch()
        while pending:
            batch = [(path, image.result()) for path, image in pending]
            pending = submit_batch()
            readable = [image for _, image in batch if not isinstance(image, str)]
            labels = iter(top_k(forward(np.stack(readable)).numpy(), class_names, k, task) if readable else ())
            for path, image in batch:
                yield (
                    FilePrediction(path, error=image) if isinstance(image, str) else FilePrediction(path, next(labels))
                )


def _read(to_square: Callable[[bytes], np.ndarray | str], path: Path) -> np.ndarray | str:
    """Return the image as uint8 (R, R, 3), or the reason why the file cannot be read."""
    try:
        if reason := size_problem(path.stat().st_size):
            return reason
        encoded = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: the path contains a null byte
        return f"cannot be opened: {getattr(error, 'strerror', None) or error}"
    return to_square(encoded)


def _to_square(
    preprocess_fn: tf.types.experimental.PolymorphicFunction, background: Background, encoded: bytes
) -> np.ndarray | str:
    """Return the image of a file as uint8 (R, R, 3), or the reason why it cannot be used."""
    decodable = make_decodable(encoded, background)
    if isinstance(decodable, str):
        return decodable
    file, header = decodable
    try:
        with tf.device("CPU:0"):
            return preprocess_fn(file, header.orientation).numpy()
    except tf.errors.OpError:
        return f"is a damaged {header.kind}"


def top_k(
    logits: np.ndarray, class_names: Sequence[str], k: int = 5, task: Task = SINGLE_LABEL
) -> list[tuple[Label, ...]]:
    """Return the most probable classes of each row; the first class wins among equals.

    Args:
        logits: (N, K).
        class_names: K names.
        k: Number of classes; all of them where there are fewer.
        task: What the logits mean.

    Returns:
        For each row, min(k, K) labels, the most probable first.

    Raises:
        RunError: If a logit is not finite.
    """
    if not np.isfinite(logits).all():
        raise RunError(
            "the model's output is not finite: its weights have diverged; train it anew, with a lower optimizer.base_lr"
        )
    classes = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    probabilities = np.take_along_axis(task.probabilities(logits), classes, axis=1)
    return [
        tuple(Label(class_names[i], probability) for i, probability in zip(*row, strict=True))
        for row in zip(classes.tolist(), probabilities.tolist(), strict=True)
    ]


def format_prediction(prediction: FilePrediction) -> Group:
    """Format the labels of one file with their probabilities, for the console."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for label in prediction.top:
        table.add_row(
            f"  {label.probability:6.1%}", Text("█" * round(20 * label.probability), style="cyan"), Text(label.name)
        )
    failure = [] if prediction.error is None else [Text(f"  {prediction.error}", style="red")]
    return Group(Text(str(prediction.path), style="bold"), *failure, table)

"""Labels for picture files, through the same preprocessing as training's validation, and how they are written down."""

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TextIO

import keras
import numpy as np
import tensorflow as tf
from rich.console import Group
from rich.table import Table
from rich.text import Text

from pipeline.data.inspection import read_header, too_large
from pipeline.data.preprocessing import Resize, preprocess
from pipeline.errors import RunError

BATCH = 32  # pictures; two batches bound the memory, whatever the number of files: one in the model, and the next one being read


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
    model: keras.Model,
    class_names: Sequence[str],
    paths: Iterable[str | Path],
    *,
    resolution: int,
    resize: Resize,
    k: int = 5,
) -> Iterator[FilePrediction]:
    """Predicts files one batch after the other, in constant memory. While the model works on one batch, the next is read.

    Args:
        model: float32 (B, R, R, 3) in [0, 255] to float32 logits (B, K).
        class_names: K names, in the order of the logits.
        paths: The picture files.
        resolution: Side R of the model's input, in pixels.
        resize: How a picture becomes a square: as in the model's training.
        k: Classes per picture; all of them where the model has fewer.

    Yields:
        A prediction per file, in the order of `paths`. A file that cannot be read yields its reason.

    Raises:
        RunError: If a logit is not finite.
    """
    scalar = [tf.TensorSpec((), tf.string), tf.TensorSpec((), tf.int32)]
    to_square = tf.function(partial(preprocess, resolution=resolution, resize=resize), input_signature=scalar)

    @tf.function(input_signature=[tf.TensorSpec((None, resolution, resolution, 3), tf.uint8)])
    def forward(images: tf.Tensor) -> tf.Tensor:
        return model(tf.cast(images, tf.float32), training=False)

    remaining = map(Path, paths)
    with ThreadPoolExecutor(min(BATCH, os.cpu_count() or 1)) as pool:

        def start_reading() -> list[tuple[Path, Future[np.ndarray | str]]]:
            return [(path, pool.submit(_read, to_square, path)) for path in islice(remaining, BATCH)]

        ahead = start_reading()
        while ahead:
            batch = [(path, picture.result()) for path, picture in ahead]
            ahead = start_reading()
            readable = [picture for _, picture in batch if not isinstance(picture, str)]
            labels = iter(top_k(forward(np.stack(readable)).numpy(), class_names, k) if readable else ())
            for path, picture in batch:
                yield (
                    FilePrediction(path, error=picture)
                    if isinstance(picture, str)
                    else FilePrediction(path, next(labels))
                )


def _read(to_square: tf.types.experimental.PolymorphicFunction, path: Path) -> np.ndarray | str:
    """The file as uint8 (R, R, 3), or why it cannot be read."""
    try:
        if reason := too_large(path.stat().st_size):
            return reason
        encoded = path.read_bytes()
    except (OSError, ValueError) as error:  # the latter of a path that holds a null byte
        return f"cannot be opened: {getattr(error, 'strerror', None) or error}"
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

    Raises:
        RunError: If a logit is not finite.
    """
    if not np.isfinite(logits).all():
        raise RunError(
            "the model's output is not finite: its weights have diverged; train it anew, with a lower optimizer.base_lr"
        )
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
        table.add_row(
            f"  {label.probability:6.1%}", Text("█" * round(20 * label.probability), style="cyan"), Text(label.name)
        )
    failure = [] if prediction.error is None else [Text(f"  {prediction.error}", style="red")]
    return Group(Text(str(prediction.path), style="bold"), *failure, table)


def csv_rows(file: TextIO, k: int) -> Callable[[FilePrediction], None]:
    """Starts a CSV file with the columns path, error, class1, probability1, and so on to `k`; what is returned adds a row."""
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(
        ["path", "error", *(f"{name}{rank}" for rank in range(1, k + 1) for name in ("class", "probability"))]
    )

    def add(prediction: FilePrediction) -> None:
        cells = [cell for label in prediction.top for cell in (label.name, f"{label.probability:.6g}")]
        rows.writerow([prediction.path, prediction.error, *(cells or [""] * (2 * k))])
        file.flush()

    return add


def json_rows(file: TextIO) -> Callable[[FilePrediction], None]:
    """What is returned adds a line {"path": ..., "top": [{"class": ..., "probability": ...}, ...], "error": null or a reason}."""

    def add(prediction: FilePrediction) -> None:
        top = [{"class": label.name, "probability": float(f"{label.probability:.6g}")} for label in prediction.top]
        file.write(
            json.dumps({"path": str(prediction.path), "top": top, "error": prediction.error}, ensure_ascii=False) + "\n"
        )
        file.flush()

    return add

"""Predictions of a whole split, every image exactly once, and the figures that are counted from them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import keras
import numpy as np
import pandas as pd
import tensorflow as tf
from scipy.special import log_softmax
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from pipeline.distributed.devices import on_replicas
from pipeline.errors import RunError


@dataclass(frozen=True)
class Predictions:
    """What a model said about N images, one row per image, sorted by index.

    Attributes:
        index: int64 (N,), rows of the manifest, each once.
        labels: int32 (N,), true classes in [0, K).
        logits: float32 (N, K), the model's outputs.
    """

    index: np.ndarray
    labels: np.ndarray
    logits: np.ndarray


class Predictor:
    """The forward pass over a data set, traced once per model however often it is called.

    It reads the model's variables as they stand at each call.
    """

    def __init__(self, model: keras.Model, strategy: tf.distribute.Strategy) -> None:
        """Prepares the pass.

        Args:
            model: float32 (B, R, R, 3) in [0, 255] to float32 logits (B, K), created in the scope of `strategy`.
            strategy: Its replicas share every batch.
        """
        self._strategy = strategy

        def forward(images: tf.Tensor, labels: tf.Tensor, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            logits = model(tf.cast(images, tf.float32), training=False)
            return index, tf.argmax(labels, axis=-1, output_type=tf.int32), tf.cast(logits, tf.float32)

        @tf.function(reduce_retracing=True)
        def step(images: tf.Tensor, labels: tf.Tensor, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            shares = strategy.run(forward, args=(images, labels, index))
            return tuple(
                strategy.gather(share, axis=0) for share in shares
            )  # one by one: of a tuple, gather keeps replica 0's share only

        self._step = step

    def __call__(self, dataset: tf.data.Dataset, *, progress: Callable[[int, int], None] | None = None) -> Predictions:
        """Predicts a split.

        Args:
            dataset: Finite; yields images uint8 (B, R, R, 3), labels float32 (B, K) one-hot, weights float32 (B,) and index int64 (B,),
                B being the global batch size, or this process's share of it. Rows of weight 0 with index -1 are padding.
            progress: Called with the number of batches done and of all.

        Returns:
            The predictions of all rows but the padding.

        Raises:
            RuntimeError: If the data set yields an image more than once, or none at all.
        """
        total = int(dataset.cardinality())
        several = self._strategy.num_replicas_in_sync > 1
        batches = []
        for images, labels, _, index in on_replicas(dataset, self._strategy) if several else dataset:
            batches.append([part.numpy() for part in self._step(images, labels, index)])
            if progress is not None:
                progress(len(batches), total)
        return join_batches(batches)


def join_batches(batches: Sequence[Sequence[np.ndarray]]) -> Predictions:
    """Makes one of the predictions of a data set's batches: index, labels and logits of each; rows of index -1 are left out.

    Raises:
        RuntimeError: If an image was predicted more than once, or none at all.
    """
    if not batches:
        raise RuntimeError("the data set to be predicted yields no images")
    index, labels, logits = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    rows = np.flatnonzero(index >= 0)
    rows = rows[np.argsort(index[rows], kind="stable")]
    index, labels, logits = index[rows], labels[rows], logits[rows]
    repeated = np.unique(index[1:][index[1:] == index[:-1]])
    if len(repeated):
        raise RuntimeError(
            f"{len(repeated)} images were predicted more than once, the first of them row {repeated[0]} of the manifest"
        )
    if not len(index):
        raise RuntimeError("the data set to be predicted yields nothing but padding")
    return Predictions(index, labels, logits)


@dataclass(frozen=True)
class Evaluation:
    """How good the predictions of a split are.

    Attributes:
        split: Its name.
        num_images: N.
        loss: Mean cross-entropy in nats, without label smoothing.
        top1: Share of the images whose true class has the greatest logit.
        top5: Share of the images whose true class is among the min(5, K) greatest.
        balanced_accuracy: Mean recall over the classes that the split holds.
        macro_f1: Mean F1 over the classes that the split holds or the model predicted.
        per_class: A row per class: class, precision, recall, f1 in [0, 1], support (images of it). What is undefined is NaN: precision
            where a class was never predicted, recall where the split has no image of it, F1 where both hold.
        confusion: int64 (K, K), images of the true class (row) that were predicted as a class (column).
    """

    split: str
    num_images: int
    loss: float
    top1: float
    top5: float
    balanced_accuracy: float
    macro_f1: float
    per_class: pd.DataFrame
    confusion: np.ndarray

    def headline(self) -> dict[str, float]:
        """The figures for tracking, by names such as `test/accuracy`."""
        return {
            f"{self.split}/loss": self.loss,
            f"{self.split}/accuracy": self.top1,
            f"{self.split}/top5_accuracy": self.top5,
            f"{self.split}/balanced_accuracy": self.balanced_accuracy,
            f"{self.split}/macro_f1": self.macro_f1,
        }


def evaluate_predictions(predictions: Predictions, class_names: Sequence[str], split: str) -> Evaluation:
    """Counts what the predictions got right.

    Of equal logits the one of the class that comes first ranks higher, in top-1 as in top-5: a model that says the same of every class is
    right where argmax is.

    Args:
        predictions: Of N images, at least one.
        class_names: K names, in the order of the logits.
        split: Name of the split.

    Returns:
        The evaluation.

    Raises:
        RunError: If a logit is not finite.
    """
    labels, logits = predictions.labels, predictions.logits
    broken = ~np.isfinite(logits).all(axis=1)
    if broken.any():
        raise RunError(
            f"the model's output is not finite for {broken.sum()} of the {len(labels)} images of the split {split}: "
            "its weights have diverged; train with a lower optimizer.base_lr, anew or by --resume and --allow-change"
        )
    classes = np.arange(len(class_names))
    predicted = logits.argmax(axis=1)
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=classes, zero_division=np.nan
    )
    rank = rank_of_label(logits, labels)
    return Evaluation(
        split=split,
        num_images=len(labels),
        loss=float(_cross_entropy(logits, labels).mean()),
        top1=float((rank < 1).mean()),
        top5=float((rank < 5).mean()),
        balanced_accuracy=float(np.nanmean(recall)),
        macro_f1=float(np.nanmean(f1)),
        per_class=pd.DataFrame(
            {"class": list(class_names), "precision": precision, "recall": recall, "f1": f1, "support": support}
        ),
        confusion=confusion_matrix(labels, predicted, labels=classes).astype(np.int64),
    )


def rank_of_label(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The number of classes that rank above the true one: int64 (N,) in [0, K)."""
    true = np.take_along_axis(logits, labels[:, None], axis=1)
    earlier = np.arange(logits.shape[1]) < labels[:, None]
    return ((logits > true) | ((logits == true) & earlier)).sum(axis=1)


def _cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[label] in nats: float64 (N,)."""
    return -np.take_along_axis(log_softmax(logits.astype(np.float64), axis=1), labels[:, None], axis=1)[:, 0]

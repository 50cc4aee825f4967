"""The forward pass over a split, in which every image is predicted exactly once."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

from pipeline.distributed.sharding import on_replicas
from pipeline.tasks import SINGLE_LABEL, Task

Step = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], Sequence[tf.Tensor | np.ndarray]]


@dataclass(frozen=True)
class Predictions:
    """The predictions of a model for N images, one row per image, sorted by index.

    Attributes:
        index: int64 (N,), rows of the manifest, each once.
        labels: int32 (N,), true classes in [0, K).
        logits: float32 (N, K), the model's outputs.
        task: What labels and logits mean.
    """

    index: np.ndarray
    labels: np.ndarray
    logits: np.ndarray
    task: Task = SINGLE_LABEL

    @property
    def decisions(self) -> np.ndarray:
        """The labels that the network decides on, int64 (N,)."""
        return self.task.decide(self.logits)

    def probabilities(self, temperature: float = 1.0) -> np.ndarray:
        """Return the predicted probabilities, float64 (N, K); the logits are divided by the temperature."""
        return self.task.probabilities(self.logits, temperature)


class Predictor:
    """The forward pass of a model over a data set, traced once per model however often it is called.

    It reads the model's variables as they stand at each call.
    """

    def __init__(self, model: keras.Model, strategy: tf.distribute.Strategy, task: Task) -> None:
        """Prepare the forward pass.

        Args:
            model: float32 (B, R, R, 3) in [0, 255] to float32 logits (B, K), created in the scope of `strategy`.
            strategy: Its replicas share every batch.
            task: What its labels and logits mean.
        """
        self._strategy, self._task = strategy, task

        def forward(images: tf.Tensor, labels: tf.Tensor, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            logits = model(tf.cast(images, tf.float32), training=False)
            return index, task.decode(labels), tf.cast(logits, tf.float32)

        @tf.function(reduce_retracing=True)
        def step(images: tf.Tensor, labels: tf.Tensor, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            per_replica = strategy.run(forward, args=(images, labels, index))
            # One by one: given a tuple, `gather` returns the values of replica 0 only.
            return tuple(strategy.gather(values, axis=0) for values in per_replica)

        self._step = step

    def __call__(self, dataset: tf.data.Dataset, *, progress: Callable[[int, int], None] | None = None) -> Predictions:
        """Predict a split.

        Args:
            dataset: Finite; yields images uint8 (B, R, R, 3), labels float32 (B, K) one-hot, weights float32 (B,) and
                index int64 (B,), B being the global batch size, or this process's share of it. Rows of weight 0 with
                index -1 are padding.
            progress: Called with the number of finished batches and the number of all batches.

        Returns:
            The predictions of all rows except the padding.

        Raises:
            RuntimeError: If the data set yields an image more than once, or no image at all.
        """
        distributed = self._strategy.num_replicas_in_sync > 1
        batches = on_replicas(dataset, self._strategy) if distributed else dataset
        num_batches = int(dataset.cardinality())
        return predict_batches(batches, self._step, self._task, num_batches=num_batches, progress=progress)


def predict_batches(
    batches: Iterable[tuple[tf.Tensor, ...]],
    step: Step,
    task: Task,
    *,
    num_batches: int,
    progress: Callable[[int, int], None] | None,
) -> Predictions:
    """Run a prediction step on every batch and join the results.

    Args:
        batches: Images, labels, weights and index of each batch, as for `Predictor.__call__`.
        step: Maps images, labels and index of a batch to its index int64 (B,), labels int32 (B,) and logits float32
            (B, K).
        task: What labels and logits mean.
        num_batches: Number of all batches, for `progress`.
        progress: Called with the number of finished batches and the number of all batches.

    Returns:
        The predictions of all rows except the padding.

    Raises:
        RuntimeError: If an image was predicted more than once, or no image at all.
    """
    results = []
    for images, labels, _, index in batches:
        results.append([np.asarray(output) for output in step(images, labels, index)])
        if progress is not None:
            progress(len(results), num_batches)
    return join_batches(results, task)


def join_batches(batches: Sequence[Sequence[np.ndarray]], task: Task) -> Predictions:
    """Concatenate the predictions of batches, without the rows of index -1, sorted by index.

    Args:
        batches: Index, labels and logits of each batch.
        task: What labels and logits mean.

    Raises:
        RuntimeError: If an image was predicted more than once, or no image at all.
    """
    if not batches:
        raise RuntimeError("the data set to be predicted yields no images")
    index, labels, logits = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    rows = np.flatnonzero(index >= 0)
    rows = rows[np.argsort(index[rows], kind="stable")]
    index, labels, logits = index[rows], labels[rows], logits[rows]
    repeated = np.unique(index[1:][index[1:] == index[:-1]])
    if len(repeated):
        raise RuntimeError(
            f"{len(repeated)} images were predicted more than once; the first one is row {repeated[0]} of the manifest"
        )
    if not len(index):
        raise RuntimeError("the data set to be predicted yields nothing but padding")
    return Predictions(index, labels, logits, task)

"""What a label means: its encoding, loss, probabilities and decision.

A task is the only place that knows how labels and logits belong together. The input pipeline, the training step, the
evaluation, the heads and the exports ask it. `pipeline.evaluation.metrics` names the tasks that each metric applies to.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from scipy.special import log_softmax, logsumexp, softmax


class Task(ABC):
    """A kind of label for K classes.

    Targets are labels as the network is trained on them: float32 (B, K). Logits are the network's outputs: float
    (N, K).

    Attributes:
        name: Value of `task` in the config.
        activation_name: What turns logits into probabilities, for the metadata of an export.
    """

    name: str
    activation_name: str

    @abstractmethod
    def encode(self, labels: tf.Tensor, num_classes: int) -> tf.Tensor:
        """Return the targets of labels as the manifest holds them, float32 (..., K)."""

    @abstractmethod
    def decode(self, targets: tf.Tensor) -> tf.Tensor:
        """Return the labels of targets that are not mixed, as the manifest holds them."""

    @abstractmethod
    def loss(
        self, targets: tf.Tensor, logits: tf.Tensor, *, label_smoothing: float, class_weights: np.ndarray | None
    ) -> tf.Tensor:
        """Compute the training loss of each image.

        Args:
            targets: float32 (B, K), possibly mixed.
            logits: float32 (B, K).
            label_smoothing: In [0, 1).
            class_weights: float32 (K,), the weight of each class; None if all classes weigh the same.

        Returns:
            float32 (B,), in nats.
        """

    @abstractmethod
    def is_correct(self, targets: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
        """Tell which images are classified correctly, bool (B,)."""

    @abstractmethod
    def activation(self, logits: tf.Tensor) -> tf.Tensor:
        """Return the probabilities within a TensorFlow graph, of the logits' type."""

    @abstractmethod
    def probabilities(self, logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        """Return the probabilities, float64 (N, K); the logits are divided by the temperature."""

    @abstractmethod
    def negative_log_likelihood(self, labels: np.ndarray, logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        """Return the negative log-likelihood of each image's label, float64 (N,) in nats."""

    @abstractmethod
    def decide(self, logits: np.ndarray) -> np.ndarray:
        """Return the labels that the network decides on, in the form of the manifest's."""

    @abstractmethod
    def average(self, logits: Sequence[np.ndarray]) -> np.ndarray:
        """Combine several views of the same images: logits (N, K) whose probabilities are the mean of the views'."""

    @abstractmethod
    def merge_logits(self, logits: np.ndarray, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Compute the logits of classes that each merge one or more old ones, float64 (..., K).

        Args:
            logits: Of the old classes, float (..., K_old).
            rows: For each of the K classes the indices of its old ones.
        """

    @abstractmethod
    def merge_rows(self, kernel: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, float]:
        """Approximate one class that merges n old ones.

        Args:
            kernel: The old classes' columns, float32 (C, n).
            bias: float32 (n,).

        Returns:
            Its column, float64 (C,), and its bias.
        """


class SingleLabel(Task):
    """Each image belongs to exactly one class. A label is the class's number; probabilities are the softmax."""

    name = "single_label"
    activation_name = "softmax"

    def encode(self, labels: tf.Tensor, num_classes: int) -> tf.Tensor:
        """Return one-hot targets; labels are int32."""
        return tf.one_hot(labels, num_classes)

    def decode(self, targets: tf.Tensor) -> tf.Tensor:
        """Return the classes, int32 (B,)."""
        return tf.argmax(targets, axis=-1, output_type=tf.int32)

    def loss(
        self, targets: tf.Tensor, logits: tf.Tensor, *, label_smoothing: float, class_weights: np.ndarray | None
    ) -> tf.Tensor:
        """Compute the cross-entropy.

        Class weights are linear in the target, so that a mixed image is weighted by its soft label.
        """
        image_weights = None
        if class_weights is not None:
            targets = targets * class_weights
            image_weights = tf.reduce_sum(targets, -1)
            targets = targets / image_weights[:, tf.newaxis]
        smoothed = targets * (1 - label_smoothing) + label_smoothing / targets.shape[-1]
        loss = tf.nn.softmax_cross_entropy_with_logits(smoothed, logits)
        return loss if image_weights is None else image_weights * loss

    def is_correct(self, targets: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
        """Tell where the class with the greatest target has the greatest logit."""
        return tf.equal(tf.argmax(logits, -1), tf.argmax(targets, -1))

    def activation(self, logits: tf.Tensor) -> tf.Tensor:
        """Return the softmax."""
        return tf.nn.softmax(logits)

    def probabilities(self, logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        """Return the softmax."""
        return softmax(logits.astype(np.float64) / temperature, axis=1)

    def negative_log_likelihood(self, labels: np.ndarray, logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        """Return the negative log-probability of the true class."""
        return -log_softmax(logits.astype(np.float64) / temperature, axis=1)[np.arange(len(labels)), labels]

    def decide(self, logits: np.ndarray) -> np.ndarray:
        """Return the class with the greatest logit, int64 (N,); the first one among equals."""
        return logits.argmax(axis=1)

    def average(self, logits: Sequence[np.ndarray]) -> np.ndarray:
        """Return the logarithms of the mean probabilities, float64."""
        return logsumexp([log_softmax(each.astype(np.float64), axis=1) for each in logits], axis=0) - np.log(
            len(logits)
        )

    def merge_logits(self, logits: np.ndarray, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Return log-sum-exp over the old classes of each, so that softmax adds their probabilities."""
        wide = np.asarray(logits, np.float64)
        return np.stack([np.logaddexp.reduce(wide[..., list(row)], axis=-1) for row in rows], axis=-1)

    def merge_rows(self, kernel: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, float]:
        """Return the mean, its bias raised by log(n): by Jensen's inequality a lower bound of log-sum-exp."""
        return kernel.mean(axis=1, dtype=np.float64), bias.mean(dtype=np.float64) + np.log(kernel.shape[1])


SINGLE_LABEL = SingleLabel()
TASKS: dict[str, Task] = {task.name: task for task in (SINGLE_LABEL,)}

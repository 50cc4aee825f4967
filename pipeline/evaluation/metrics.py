"""The metrics of a split, defined in one table: value, bootstrap form, title, format and direction of each."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from pipeline.errors import RunError
from pipeline.evaluation.calibration import PerImageScores
from pipeline.evaluation.predictor import Predictions
from pipeline.tasks import SINGLE_LABEL, Task

PERCENT, SIGNED_PERCENT, NUMBER = "{:.2%}", "{:+.2%}", "{:.4f}"


class ClassCounts(NamedTuple):
    """Numbers of images per class, in each of R resamples of a split; float64 (R, K) each."""

    true: np.ndarray
    """Images whose label is the class."""
    predicted: np.ndarray
    """Images that the model assigns to the class."""
    correct: np.ndarray
    """Images of the class that the model assigns to it."""


class MetricInputs:
    """The predictions of N images and what the metrics share, computed when first needed.

    Attributes:
        labels: int32 (N,), true classes in [0, K).
        logits: float32 (N, K), all finite.
    """

    def __init__(self, predictions: Predictions) -> None:
        """Take the predictions; nothing is computed yet."""
        self._predictions = predictions
        self.labels, self.logits = predictions.labels, predictions.logits

    @cached_property
    def scores(self) -> PerImageScores:
        """Confidence, cross-entropy and Brier score of each image."""
        return PerImageScores.from_predictions(self._predictions)

    @cached_property
    def predicted(self) -> np.ndarray:
        """The class with the greatest logit, int64 (N,); the first one among equals."""
        return self._predictions.decisions

    @cached_property
    def rank(self) -> np.ndarray:
        """The number of classes that rank above the true one, int64 (N,) in [0, K); the first one wins among equals."""
        true = np.take_along_axis(self.logits, self.labels[:, None], axis=1)
        earlier = np.arange(self.logits.shape[1]) < self.labels[:, None]
        return ((self.logits > true) | ((self.logits == true) & earlier)).sum(axis=1)

    @cached_property
    def class_counts(self) -> ClassCounts:
        """The counts with every image once, R = 1."""
        return count_classes(self.labels, self.predicted, self.logits.shape[1])


def count_classes(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> ClassCounts:
    """Count the images of each class, every image once.

    Args:
        labels: int (N,), true classes in [0, K).
        predicted: int (N,), predicted classes in [0, K).
        num_classes: K.

    Returns:
        The counts, R = 1.
    """

    def count(classes: np.ndarray) -> np.ndarray:
        return np.bincount(classes, minlength=num_classes).astype(np.float64)[None]

    return ClassCounts(count(labels), count(predicted), count(labels[labels == predicted]))


@dataclass(frozen=True)
class MetricSpec:
    """A metric. Exactly one of `per_image` and `from_counts` defines its value, and with it its bootstrap.

    Attributes:
        title: Name in reports.
        format: Format of the value in reports, for `str.format`.
        higher_is_better: Direction; None where the best value lies in between, at 0.
        per_image: Values of the images, float64 (N,), whose mean is the metric; a resample weights them.
        from_counts: The metric of R resamples, float64 (R,), from their class counts.
        bounds: Least and greatest possible value.
        proportion: Whether it is a proportion of the images (micro) or the mean of one over the classes (macro); None
            for neither. It gives the interval where all resamples agree.
        may_be_best: Whether `train.best_metric` may name it; the Literal in `pipeline.config.train` lists the same.
        min_classes: Number of classes from which on reports show it.
        tasks: Tasks that it applies to.
    """

    title: str
    format: str
    higher_is_better: bool | None
    per_image: Callable[[MetricInputs], np.ndarray] | None = None
    from_counts: Callable[[ClassCounts], np.ndarray] | None = None
    bounds: tuple[float, float] = (0.0, 1.0)
    proportion: Literal["micro", "macro"] | None = None
    may_be_best: bool = False
    min_classes: int = 1
    tasks: tuple[Task, ...] = (SINGLE_LABEL,)

    def __call__(self, inputs: MetricInputs) -> float:
        """Compute the metric with every image once."""
        if self.per_image is not None:
            return float(self.per_image(inputs).mean())
        assert self.from_counts is not None
        return float(self.from_counts(inputs.class_counts)[0])


def recall(counts: ClassCounts) -> np.ndarray:
    """Compute the recall per class, float64 (R, K); NaN where a class has no image."""
    with np.errstate(invalid="ignore"):
        return counts.correct / counts.true


def f1_score(counts: ClassCounts) -> np.ndarray:
    """Compute F1 per class, float64 (R, K); NaN where a class neither has an image nor is predicted."""
    with np.errstate(invalid="ignore"):
        return 2 * counts.correct / (counts.true + counts.predicted)


def matthews_corrcoef(counts: ClassCounts) -> np.ndarray:
    """Compute Matthews' correlation coefficient for K classes, float64 (R,) in [-1, 1]; 0 where it is undefined.

    Gorodkin 2004, Computational Biology and Chemistry 28, 367.
    """
    images, correct = counts.true.sum(axis=1), counts.correct.sum(axis=1)
    covariance = correct * images - (counts.true * counts.predicted).sum(axis=1)
    variances = [images**2 - (each**2).sum(axis=1) for each in (counts.true, counts.predicted)]
    scale = np.sqrt(variances[0] * variances[1])
    return np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0)


METRICS: dict[str, MetricSpec] = {
    "accuracy": MetricSpec(
        title="accuracy",
        format=PERCENT,
        higher_is_better=True,
        per_image=lambda inputs: inputs.scores.correct,
        proportion="micro",
        may_be_best=True,
    ),
    "top5_accuracy": MetricSpec(
        title="top 5 accuracy",
        format=PERCENT,
        higher_is_better=True,
        per_image=lambda inputs: (inputs.rank < 5).astype(np.float64),
        proportion="micro",
        may_be_best=True,
        min_classes=6,
    ),
    "balanced_accuracy": MetricSpec(  # the mean over the classes that the split holds
        title="balanced accuracy",
        format=PERCENT,
        higher_is_better=True,
        from_counts=lambda counts: np.nanmean(recall(counts), axis=1),
        proportion="macro",
        may_be_best=True,
    ),
    "macro_f1": MetricSpec(  # the mean over the classes that the split holds or the model predicts
        title="macro F1",
        format=PERCENT,
        higher_is_better=True,
        from_counts=lambda counts: np.nanmean(f1_score(counts), axis=1),
        proportion="macro",
        may_be_best=True,
    ),
    "matthews_corrcoef": MetricSpec(
        title="Matthews' correlation",
        format=NUMBER,
        higher_is_better=True,
        bounds=(-1.0, 1.0),
        from_counts=matthews_corrcoef,
    ),
    "loss": MetricSpec(  # mean cross-entropy, without label smoothing
        title="loss (nats)",
        format=NUMBER,
        higher_is_better=False,
        per_image=lambda inputs: inputs.scores.loss,
        bounds=(0.0, math.inf),
        may_be_best=True,
    ),
    "brier": MetricSpec(
        title="Brier score",
        format=NUMBER,
        higher_is_better=False,
        per_image=lambda inputs: inputs.scores.brier,
        bounds=(0.0, 2.0),
    ),
    "overconfidence": MetricSpec(  # mean confidence minus accuracy
        title="overconfidence",
        format=SIGNED_PERCENT,
        higher_is_better=None,
        per_image=lambda inputs: inputs.scores.confidence - inputs.scores.correct,
        bounds=(-1.0, 1.0),
    ),
}


def metrics_of(task: Task) -> dict[str, MetricSpec]:
    """Return the metrics that apply to a task, in the order of `METRICS`."""
    return {name: spec for name, spec in METRICS.items() if task in spec.tasks}


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a split.

    Attributes:
        split: Its name.
        num_images: N.
        metrics: Value of each metric of the task, by name.
        per_class: A row per class: class, precision, recall, f1 in [0, 1], support (its images). Undefined values are
            NaN: precision where a class was never predicted, recall where the split has no image of it, F1 where both
            hold.
        confusion: int64 (K, K), images of the true class (row) that were predicted as a class (column).
    """

    split: str
    num_images: int
    metrics: dict[str, float]
    per_class: pd.DataFrame
    confusion: np.ndarray

    @property
    def accuracy(self) -> float:
        """The proportion of images whose true class has the greatest logit."""
        return self.metrics["accuracy"]

    def scalar_metrics(self) -> dict[str, float]:
        """Return the metrics for tracking, by names such as `test/accuracy`."""
        return {f"{self.split}/{name}": value for name, value in self.metrics.items()}


def evaluate_predictions(predictions: Predictions, class_names: Sequence[str], split: str) -> Evaluation:
    """Compute the metrics of a split.

    Among equal logits the class that comes first ranks higher, in top-1 as in top-5: a model that outputs the same for
    every class is right where argmax is.

    Args:
        predictions: Of N images, at least one.
        class_names: K names, in the order of the logits.
        split: Name of the split.

    Returns:
        The evaluation.

    Raises:
        RunError: If a logit is not finite.
    """
    labels = predictions.labels
    non_finite = ~np.isfinite(predictions.logits).all(axis=1)
    if non_finite.any():
        raise RunError(
            f"the model's output is not finite for {non_finite.sum()} of the {len(labels)} images of the split "
            f"{split}: its weights have diverged; train with a lower optimizer.base_lr, from scratch or with --resume "
            "and --allow-change"
        )
    inputs, classes = MetricInputs(predictions), np.arange(len(class_names))
    precision, recalls, f1, support = precision_recall_fscore_support(
        labels, inputs.predicted, labels=classes, zero_division=np.nan
    )
    return Evaluation(
        split=split,
        num_images=len(labels),
        metrics={name: spec(inputs) for name, spec in metrics_of(predictions.task).items()},
        per_class=pd.DataFrame(
            {"class": list(class_names), "precision": precision, "recall": recalls, "f1": f1, "support": support}
        ),
        confusion=confusion_matrix(labels, inputs.predicted, labels=classes).astype(np.int64),
    )

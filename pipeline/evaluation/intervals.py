"""How sure the figures of a split are, as it is one sample of the pictures that there could be: bootstrap intervals.

The expected calibration error has none: counted on few images it lies above the true one, by chance alone, and so do all resamples (of such
intervals for a nearly calibrated network, none held the true error in a simulation). `calibration` tells what chance alone gives instead.
The overconfidence has one.
"""

from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix
from scipy.stats import binomtest, norm

from pipeline.evaluation.calibration import PerImageScores
from pipeline.evaluation.metrics import Predictions, rank_of_label

RESAMPLES = 2000
CONFIDENCE_LEVEL = 0.95
CHUNK_RESAMPLES = 1 << 22  # weights in memory at once


class ConfidenceInterval(NamedTuple):
    """Bounds of a figure."""

    low: float
    high: float


class BootstrapMetrics:
    """The headline figures of a split as functions of how often each of its images counts.

    With every image once they are the figures of `evaluate_predictions` and `calibration`.
    """

    names = ("accuracy", "top5_accuracy", "balanced_accuracy", "macro_f1", "loss", "brier", "overconfidence")

    def __init__(self, predictions: Predictions) -> None:
        """Takes N images, at least one."""
        scores, (images, classes) = PerImageScores.of(predictions), predictions.logits.shape
        rows, ones = np.arange(images), np.ones(images)
        predicted = predictions.logits.argmax(axis=1)
        top5 = (rank_of_label(predictions.logits, predictions.labels) < 5).astype(np.float64)
        self._means = np.stack(
            [scores.correct, top5, scores.loss, scores.brier, scores.confidence - scores.correct], axis=1
        )
        self._labelled = csr_matrix((ones, (rows, predictions.labels)), (images, classes))
        self._hits = csr_matrix((scores.correct, (rows, predictions.labels)), (images, classes))
        self._predicted = csr_matrix((ones, (rows, predicted)), (images, classes))

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """Counts the figures.

        Args:
            weights: float64 (R, N), how often each image counts; every row has one above 0.

        Returns:
            float64 (R, len(names)).
        """
        total = weights.sum(axis=1)
        accuracy, top5, loss, brier, overconfidence = (weights @ self._means).T / total
        labelled, hits, predicted = weights @ self._labelled, weights @ self._hits, weights @ self._predicted
        with np.errstate(invalid="ignore"):
            recall, f1 = hits / labelled, 2 * hits / (labelled + predicted)  # NaN for classes that are not there
        return np.stack(
            [accuracy, top5, np.nanmean(recall, axis=1), np.nanmean(f1, axis=1), loss, brier, overconfidence], axis=1
        )


def bootstrap(
    predictions: Predictions, groups: np.ndarray | None = None, *, seed: int = 0
) -> dict[str, ConfidenceInterval]:
    """95 % intervals of the headline figures.

    Images are drawn with replacement, whole groups at a time, as near-duplicates are no independent evidence. The percentiles are
    corrected for the median's bias (Efron 1987, without acceleration). Where all resamples agree, as when every image is right, they know
    nothing of what was not seen: the exact binomial interval of Clopper and Pearson takes their place for shares of images.

    Args:
        predictions: Of N images.
        groups: int (N,), equal for images that belong together; None where each is alone.
        seed: Of the draws.

    Returns:
        An interval by the name of each of `Figures.names`.
    """
    figures, images = BootstrapMetrics(predictions), len(predictions.labels)
    members = np.arange(images) if groups is None else np.unique(groups, return_inverse=True)[1]
    count, rng = int(members.max()) + 1, np.random.default_rng(seed)
    at_once = max(1, CHUNK_RESAMPLES // images)
    drawn = np.concatenate(
        [figures(_counts(rng, min(at_once, RESAMPLES - i), count)[:, members]) for i in range(0, RESAMPLES, at_once)]
    )
    [found] = figures(np.ones((1, images)))
    return {
        name: _share(value, images) if name.endswith("accuracy") and np.ptp(draws) == 0 else _corrected(value, draws)
        for name, value, draws in zip(BootstrapMetrics.names, found, drawn.T, strict=True)
    }


def _counts(rng: np.random.Generator, resamples: int, count: int) -> np.ndarray:
    """How often each of `count` is drawn in so many draws with replacement, float64 (resamples, count)."""
    drawn = rng.integers(0, count, (resamples, count)) + count * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * count).reshape(resamples, count).astype(np.float64)


def _corrected(value: float, draws: np.ndarray) -> ConfidenceInterval:
    below = ((draws < value).mean() + (draws <= value).mean()) / 2
    shift = norm.ppf(np.clip(below, 1 / len(draws), 1 - 1 / len(draws)))
    tail = norm.ppf((1 - CONFIDENCE_LEVEL) / 2)
    low, high = np.quantile(draws, norm.cdf([2 * shift + tail, 2 * shift - tail]))
    return ConfidenceInterval(float(min(low, value)), float(max(high, value)))


def _share(value: float, images: int) -> ConfidenceInterval:
    exact = binomtest(round(value * images), images).proportion_ci(CONFIDENCE_LEVEL, method="exact")
    return ConfidenceInterval(float(exact.low), float(exact.high))

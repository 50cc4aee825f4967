"""Statistics of metrics: bootstrap intervals of one run, and tests and intervals of the difference of two runs.

The expected calibration error has no interval: on few images it lies above the true error by chance alone, and so do
all resamples (of such intervals for a nearly calibrated network, none contained the true error in a simulation).
`calibration` reports the value that chance alone gives instead. The overconfidence has an interval.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats
from scipy.sparse import csr_matrix
from scipy.stats import beta

from pipeline.evaluation.metrics import METRICS, ClassCounts, MetricInputs, count_classes, metrics_of
from pipeline.evaluation.predictor import Predictions

CONFIDENCE_LEVEL = 0.95  # of all intervals
ALPHA = 0.05  # significance level of the tests
INTERVAL_RESAMPLES = 2000
ROUNDING = 1e-12  # an interval that is shorter has no extent
PAIRED_RESAMPLES, PAIRED_SEED = 10_000, 0
CHUNK_WEIGHTS = 1 << 22  # weights of images in memory at once
CHUNK_DRAWS = 4_000_000  # bounds the memory of the paired bootstrap to about 100 MB


class ConfidenceInterval(NamedTuple):
    """The bounds of a metric."""

    low: float
    high: float


class PairedDifference(NamedTuple):
    """The metric of run B minus that of run A, with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


class MetricComparison(NamedTuple):
    """A metric of two runs."""

    a: float
    b: float
    difference: PairedDifference


class ResampledCounts:
    """The class counts of N images as a function of how often each image counts."""

    def __init__(self, labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> None:
        """Take the true and the predicted classes, int (N,) in [0, K)."""
        rows, ones = np.arange(len(labels)), np.ones(len(labels))
        shape = (len(labels), num_classes)
        self._true = csr_matrix((ones, (rows, labels)), shape)
        self._predicted = csr_matrix((ones, (rows, predicted)), shape)
        self._correct = csr_matrix(((labels == predicted).astype(np.float64), (rows, labels)), shape)

    def __call__(self, weights: np.ndarray) -> ClassCounts:
        """Count the images of each class.

        Args:
            weights: float64 (R, N), how often each image counts.
        """
        return ClassCounts(weights @ self._true, weights @ self._predicted, weights @ self._correct)


class BootstrapMetrics:
    """The metrics of a split as functions of how often each of its images counts.

    With every image once they are the metrics of `evaluate_predictions`.

    Attributes:
        specs: The metrics of the task, by name.
    """

    def __init__(self, predictions: Predictions) -> None:
        """Take N images, at least one."""
        inputs, self.specs = MetricInputs(predictions), metrics_of(predictions.task)
        self._per_image = np.stack(
            [spec.per_image(inputs) for spec in self.specs.values() if spec.per_image is not None], axis=1
        )
        self._counts = ResampledCounts(inputs.labels, inputs.predicted, inputs.logits.shape[1])

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """Compute the metrics of resamples.

        Args:
            weights: float64 (R, N), how often each image counts; every row has a value above 0.

        Returns:
            float64 (R, len(specs)).
        """
        means = iter((weights @ self._per_image).T / weights.sum(axis=1))
        counts = self._counts(weights)
        return np.stack(
            [next(means) if spec.from_counts is None else spec.from_counts(counts) for spec in self.specs.values()],
            axis=1,
        )


def bootstrap_intervals(
    predictions: Predictions, groups: np.ndarray | None = None, *, seed: int = 0
) -> dict[str, ConfidenceInterval]:
    """Compute the 95 % interval of each metric.

    Images are drawn with replacement, whole groups at a time, because near-duplicates are not independent. The
    percentiles are those of the draws around their mean, placed around the value: a mean over classes that lose their
    only image in a draw is biased, and its plain percentiles can lie on one side of the value.

    Where the resamples agree, for example because every image is right, they carry no information about unseen images.
    A proportion then gets the exact binomial interval (Clopper and Pearson 1934, Biometrika 26, 404) of its number of
    groups; a mean over classes that of the number with which a proportion of images has the same variance,
    K^2 / sum(1 / groups of the class). Other metrics have no interval then.

    Args:
        predictions: Of N images.
        groups: int (N,), equal for near-duplicates; None where every image is a group of its own.
        seed: Of the draws.

    Returns:
        An interval by the name of each metric of the task that has one.
    """
    metrics, num_images = BootstrapMetrics(predictions), len(predictions.labels)
    groups = np.arange(num_images) if groups is None else np.unique(groups, return_inverse=True)[1]
    draws = _resample(metrics, groups, seed)
    [values] = metrics(np.ones((1, num_images)))
    trials = _independent_trials(predictions.labels, groups)
    intervals = {}
    for (name, spec), value, column in zip(metrics.specs.items(), values, draws.T, strict=True):
        interval = _centered_interval(value, column, spec.bounds)
        if interval.high - interval.low > ROUNDING:
            intervals[name] = interval
        elif spec.proportion is not None:
            intervals[name] = _binomial_interval(value, trials[spec.proportion])
    return intervals


def _independent_trials(labels: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    """Return the number of independent images behind a proportion of images (micro) and a mean over classes (macro)."""
    groups_of_class = np.bincount(np.unique(np.stack([labels, groups]), axis=1)[0])
    groups_of_class = groups_of_class[groups_of_class > 0]
    return {"micro": float(groups.max() + 1), "macro": len(groups_of_class) ** 2 / np.sum(1 / groups_of_class)}


def _resample(function: Callable[[np.ndarray], np.ndarray], groups: np.ndarray, seed: int) -> np.ndarray:
    """Apply a function of weights float64 (R, N) to all resamples of whole groups, in chunks of bounded memory."""
    num_groups, rng = int(groups.max()) + 1, np.random.default_rng(seed)
    chunk = max(1, CHUNK_WEIGHTS // len(groups))
    return np.concatenate(
        [
            function(_draw_counts(rng, min(chunk, INTERVAL_RESAMPLES - i), num_groups)[:, groups])
            for i in range(0, INTERVAL_RESAMPLES, chunk)
        ]
    )


def _draw_counts(rng: np.random.Generator, resamples: int, count: int) -> np.ndarray:
    """Return how often each of `count` is drawn in `count` draws with replacement, float64 (resamples, count)."""
    drawn = rng.integers(0, count, (resamples, count)) + count * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * count).reshape(resamples, count).astype(np.float64)


def _centered_interval(value: float, draws: np.ndarray, bounds: tuple[float, float]) -> ConfidenceInterval:
    """Return the percentiles of the draws around their mean, placed around the value, within the bounds."""
    tail = (1 - CONFIDENCE_LEVEL) / 2
    low, high = np.clip(value + np.quantile(draws - draws.mean(), [tail, 1 - tail]), *bounds)
    return ConfidenceInterval(float(min(low, value)), float(max(high, value)))


def _binomial_interval(value: float, trials: float) -> ConfidenceInterval:
    """Return the exact binomial interval of a proportion; the number of trials need not be whole."""
    hits, tail = value * trials, (1 - CONFIDENCE_LEVEL) / 2
    low = beta.ppf(tail, hits, trials - hits + 1) if value > 0 else 0.0
    high = beta.ppf(1 - tail, hits + 1, trials - hits) if value < 1 else 1.0
    return ConfidenceInterval(float(low), float(high))


def mcnemar_test(only_a: int, only_b: int) -> float:
    """Compute the two-sided p-value of McNemar's exact test (McNemar 1947, Psychometrika 12, 153).

    Args:
        only_a: Images that only run A classifies correctly.
        only_b: Images that only run B classifies correctly.

    Returns:
        The probability that these images, each won by either run with probability 1/2, are divided at least as
        unevenly.
    """
    return float(stats.binomtest(only_b, only_a + only_b).pvalue) if only_a + only_b else 1.0


def adjust_p_values(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for multiple tests by Holm's method, in the same order.

    Holm 1979, Scandinavian Journal of Statistics 6, 65.
    """
    p, order = np.array(p_values), np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(np.minimum((len(p) - np.arange(len(p))) * p[order], 1))
    return adjusted.tolist()


def paired_bootstrap(values: np.ndarray, groups: np.ndarray) -> PairedDifference:
    """Compute the mean with its 95 % percentile interval over 10,000 resamples of whole groups.

    Efron 1979; Davison and Hinkley 1997, 3.8.

    Args:
        values: float64 (N,), a paired difference per image.
        groups: int64 (N,), equal for images that are not independent of each other.

    Returns:
        The interval; without extent where there is a single group. Equal inputs give equal results.
    """
    _, group_of_image = np.unique(groups, return_inverse=True)
    sums, sizes = np.bincount(group_of_image, weights=values), np.bincount(group_of_image)
    mean = float(values.mean())
    if len(sums) == 1:
        return PairedDifference(mean, mean, mean)
    result = stats.bootstrap(
        (sums, sizes),
        lambda drawn_sums, drawn_sizes, axis: drawn_sums.sum(axis) / drawn_sizes.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=PAIRED_RESAMPLES,
        batch=max(1, CHUNK_DRAWS // len(sums)),
        confidence_level=CONFIDENCE_LEVEL,
        method="percentile",
        rng=np.random.default_rng(PAIRED_SEED),
    )
    return PairedDifference(mean, float(result.confidence_interval.low), float(result.confidence_interval.high))


def compare_class_metrics(
    labels: np.ndarray, predicted_a: np.ndarray, predicted_b: np.ndarray, num_classes: int, groups: np.ndarray
) -> dict[str, MetricComparison]:
    """Compare two runs by every metric that follows from class counts.

    Args:
        labels: int (N,), true classes in [0, K).
        predicted_a: int (N,), predictions of run A.
        predicted_b: int (N,), predictions of run B.
        num_classes: K.
        groups: int (N,), equal for near-duplicates, which are drawn together.

    Returns:
        By the metric's name both values and their difference, with its percentile interval over 2,000 resamples.
    """
    functions = {name: spec.from_counts for name, spec in METRICS.items() if spec.from_counts is not None}
    counts_a, counts_b = (ResampledCounts(labels, each, num_classes) for each in (predicted_a, predicted_b))

    def differences(weights: np.ndarray) -> np.ndarray:
        a, b = counts_a(weights), counts_b(weights)
        return np.stack([function(b) - function(a) for function in functions.values()], axis=1)

    draws = _resample(differences, np.unique(groups, return_inverse=True)[1], PAIRED_SEED)
    bounds = np.quantile(draws, [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2], axis=0).T
    a, b = (count_classes(labels, each, num_classes) for each in (predicted_a, predicted_b))
    comparisons = {}
    for (name, function), (low, high) in zip(functions.items(), bounds, strict=True):
        value_a, value_b = float(function(a)[0]), float(function(b)[0])
        difference = PairedDifference(value_b - value_a, float(low), float(high))
        comparisons[name] = MetricComparison(value_a, value_b, difference)
    return comparisons


def exact_bounds(only_a: int, only_b: int, num_images: int, num_groups: int) -> tuple[float, float]:
    """Compute the exact 95 % bounds of the difference of accuracies; they contain 0 where McNemar's p is above 0.05.

    Of the images that only one run classifies correctly, B's proportion has exact binomial bounds (Clopper and Pearson
    1934, Biometrika 26, 404). Where few images differ between the runs, the bootstrap interval is too narrow: it cannot
    draw a change that no image shows. In simulated pairs on 150 images, one in a hundred of which only B classifies
    correctly, the bootstrap interval contained the truth in 77 %; the wider of both intervals in 100 % (in other cases
    92 to 100 and 93 to 100 %).

    Args:
        only_a: Images that only run A classifies correctly.
        only_b: Images that only run B classifies correctly.
        num_images: All images that both runs were evaluated on.
        num_groups: Groups of near-duplicates among them. Where the runs agree on every image, the bounds follow from
            so many independent draws without a difference.
    """
    if only_a + only_b == 0:
        unseen = stats.binomtest(0, num_groups).proportion_ci(CONFIDENCE_LEVEL).high
        return -float(unseen), float(unseen)
    interval = stats.binomtest(only_b, only_a + only_b).proportion_ci(CONFIDENCE_LEVEL)
    low, high = ((2 * bound - 1) * (only_a + only_b) / num_images for bound in (interval.low, interval.high))
    return float(low), float(high)

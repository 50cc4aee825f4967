"""Paired comparison of runs on the same images, with a test and confidence intervals.

Two networks are compared image by image: images that both classify correctly or both wrongly carry no information about
their difference. McNemar's test gives the probability that chance alone divides the remaining images as unevenly; a
paired bootstrap gives the bounds of the true difference. Near-duplicates are not independent, so the bootstrap draws
whole groups of them; McNemar's test treats every image as independent. A run counts as better only where both agree.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa

from pipeline.console import plural
from pipeline.data.manifest import Manifest, describe_changes
from pipeline.errors import RunError
from pipeline.evaluation.statistics import (
    ALPHA,
    MetricComparison,
    PairedDifference,
    adjust_p_values,
    compare_class_metrics,
    exact_bounds,
    mcnemar_test,
    paired_bootstrap,
)

Verdict = Literal["better", "worse", "open"]
DIRECTIONS = ("right to wrong", "wrong to right")  # of the images that only one run classifies correctly


@dataclass(frozen=True, eq=False)
class RunPredictions:
    """The predictions of a run and the images that they belong to.

    Attributes:
        name: Name of the run.
        split: Split of its data.
        predictions: A row per image, as written by `report.tables.write_results`.
        images: The same images in the same order, by key.
    """

    name: str
    split: str
    predictions: pd.DataFrame
    images: Manifest

    @property
    def correct(self) -> np.ndarray:
        """Mask of the images whose predicted class is the true one, bool (N,)."""
        return (self.predictions["predicted_class"] == self.predictions["true_class"]).to_numpy()

    @property
    def losses(self) -> np.ndarray:
        """-log of the true class's probability in nats, float64 (N,)."""
        return -np.log(np.maximum(self.predictions["true_probability"].to_numpy(np.float64), np.finfo(np.float64).tiny))


def read_run_predictions(name: str, split: str, predictions: Path, manifest: Path) -> RunPredictions:
    """Read the predictions of a run on a split.

    Args:
        name: Name of the run.
        split: Split of its data.
        predictions: Parquet file of the evaluation.
        manifest: Manifest file of the run.

    Raises:
        RunError: The predictions cannot be read, or are not those of the manifest's images.
        DataError: The manifest cannot be read.
    """
    data = Manifest.load(manifest)
    try:
        rows = pd.read_parquet(predictions).sort_values("key", ignore_index=True)
        index = rows["index"].to_numpy(np.int64)
        columns = rows[["key", "true_class", "predicted_class", "probability", "true_probability"]]
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{predictions}: cannot be read ({error}); evaluate the run again") from None
    if np.array_equal(np.sort(index), data.indices(split)):
        table = data.table.iloc[index].reset_index(drop=True)
        classes = np.array(data.class_names, object)[table["label"]]
        if columns["key"].tolist() == table["key"].tolist() and columns["true_class"].tolist() == classes.tolist():
            return RunPredictions(name, split, rows, Manifest(data.class_names, table))
    raise RunError(f"{predictions}: does not match the split {split} in {manifest}; evaluate the run again")


@dataclass(frozen=True, eq=False)
class RunComparison:
    """The comparison of a run B with a run A on the same N images.

    Attributes:
        a: Name of the run that serves as the baseline.
        b: Name of the run that is compared with it.
        split: Split of the images.
        num_images: N.
        num_groups: Groups of near-duplicates among them; N where there are none.
        accuracies: Accuracy of A and of B.
        only_a: Images that only A classifies correctly.
        only_b: Images that only B classifies correctly.
        p_value: Two-sided p-value of McNemar's test, adjusted by Holm's method where there are several pairs.
        num_pairs: Pairs that were tested together.
        accuracy: Difference of the accuracies, in [-1, 1]; its interval is the wider of the bootstrap's and
            `exact_bounds`.
        loss: Difference of the mean cross-entropies in nats; None where all images are one group.
        class_metrics: By name, the metrics that follow from class counts.
        changed_images: A row for each image that only one run classifies correctly: key, true_class, turned (from A to
            B, one of DIRECTIONS), predicted_a, probability_a, predicted_b, probability_b.
    """

    a: str
    b: str
    split: str
    num_images: int
    num_groups: int
    accuracies: tuple[float, float]
    only_a: int
    only_b: int
    p_value: float
    num_pairs: int
    accuracy: PairedDifference
    loss: PairedDifference | None
    class_metrics: Mapping[str, MetricComparison]
    changed_images: pd.DataFrame

    @property
    def verdict(self) -> Verdict:
        """The result for B; "open" where the test and the interval do not both show a difference."""
        if self.p_value < ALPHA and self.accuracy.low > 0:
            return "better"
        if self.p_value < ALPHA and self.accuracy.high < 0:
            return "worse"
        return "open"

    @property
    def claim(self) -> str:
        """The verdict as a sentence."""
        if self.verdict == "open":
            return f"These {self._images} show no significant difference between {self.b} and {self.a}"
        return f"{self.b} is {self.verdict} than {self.a}"

    @property
    def evidence(self) -> str:
        """The figures behind the claim and their uncertainty, for a reader without statistics."""
        accuracy_a, accuracy_b = (format_percent(value, self.num_images) for value in self.accuracies)
        low, high = self.accuracy.low, self.accuracy.high
        if self.verdict == "open":
            return (
                f"{accuracy_b} correct against {accuracy_a}. The true difference of {self.b} may lie anywhere from "
                f"{self._difference(low)} to {self._difference(high)} (95% interval). {self._chance()}"
            )
        nearer, farther = sorted((low, high), key=abs)
        return (
            f"{accuracy_b} of the {self._images} correct against {accuracy_a}, {self._difference(self.accuracy.value)} "
            f"(95% interval {self._points(nearer)} to {self._points(farther)}). {self._chance()}"
        )

    @property
    def sentence(self) -> str:
        """The claim and its evidence."""
        return f"{self.claim}: {self.evidence}"

    @property
    def _images(self) -> str:
        return plural(self.num_images, f"{self.split} image")

    def _chance(self) -> str:
        test = f"McNemar's test, p {_p(self.p_value)}"
        if self.num_pairs > 1:
            test += f", adjusted for {self.num_pairs} comparisons by Holm's method"
        text = (
            f"If both were equally good, chance alone would produce a difference of at least this size "
            f"{_how_often(self.p_value)} ({test})."
        )
        if self.verdict == "open" and self.p_value < ALPHA:
            text += (
                " Image by image this would be significant; but near-duplicates are not independent, and by groups the "
                "interval contains 0."
            )
        return text

    def _points(self, difference: float) -> str:
        return f"{100 * abs(difference):.{_digits(self.num_images)}f}"

    def _difference(self, difference: float) -> str:
        return f"{self._points(difference)} points {'worse' if difference < 0 else 'better'}"

    def to_json(self) -> dict[str, Any]:
        """Return everything except the images, as JSON values."""
        names = ("a", "b", "split", "num_images", "num_groups", "only_a", "only_b", "p_value", "num_pairs", "verdict")
        return {
            **{name: getattr(self, name) for name in names},
            "accuracy_a": self.accuracies[0],
            "accuracy_b": self.accuracies[1],
            "accuracy_difference": self.accuracy._asdict(),
            "loss_difference": self.loss._asdict() if self.loss is not None else None,
            "class_metrics": {
                name: {"a": each.a, "b": each.b, "difference": each.difference._asdict()}
                for name, each in self.class_metrics.items()
            },
            "sentence": self.sentence,
        }


def compare(runs: Sequence[RunPredictions]) -> list[RunComparison]:
    """Compare each further run with the first one.

    Args:
        runs: At least two, evaluated on the same images.

    Returns:
        A comparison for each run except the first, in their order.

    Raises:
        RunError: The images, their labels or their contents differ. The message lists the differences.
    """
    first, *others = runs
    for other in others:
        _check_same_images(first, other)
    pairs = [_pair(first, other) for other in others]
    adjusted = adjust_p_values([pair.p_value for pair in pairs])
    return [replace(pair, p_value=p_value, num_pairs=len(pairs)) for pair, p_value in zip(pairs, adjusted, strict=True)]


def _check_same_images(first: RunPredictions, other: RunPredictions) -> None:
    """Check that both runs saw the same images; groups and sizes may differ, because they change no prediction."""
    a, b = (Manifest(run.images.class_names, run.images.table.assign(split="test")) for run in (first, other))
    if listing := describe_changes(a, b):
        raise RunError(
            f"{first.name} ({len(a.table):,} {first.split} images) and {other.name} ({len(b.table):,}) cannot be "
            f"compared: they were not evaluated on the same images\nFrom the first to the second:\n{listing}\n"
            "Where the data have no splits, seed and data.splits choose the images: train both runs with the same "
            "values, or give the data their own splits (see docs/data.md)."
        )


def _pair(first: RunPredictions, other: RunPredictions) -> RunComparison:
    correct_a, correct_b = first.correct, other.correct
    groups = min(
        (run.images.table["group"].to_numpy() for run in (first, other)), key=lambda each: len(np.unique(each))
    )
    num_groups = len(np.unique(groups))
    only_a, only_b = int((correct_a & ~correct_b).sum()), int((correct_b & ~correct_a).sum())
    resampled = paired_bootstrap(correct_b.astype(np.float64) - correct_a, groups)
    low, high = exact_bounds(only_a, only_b, len(groups), num_groups)
    loss = paired_bootstrap(other.losses - first.losses, groups) if num_groups > 1 else None
    return RunComparison(
        a=first.name,
        b=other.name,
        split=first.split,
        num_images=len(groups),
        num_groups=num_groups,
        accuracies=(float(correct_a.mean()), float(correct_b.mean())),
        only_a=only_a,
        only_b=only_b,
        p_value=mcnemar_test(only_a, only_b),
        num_pairs=1,
        accuracy=PairedDifference(resampled.value, min(resampled.low, low), max(resampled.high, high)),
        loss=loss,
        class_metrics=_class_metrics(first, other, groups),
        changed_images=_changed_images(first, other),
    )


def _class_metrics(first: RunPredictions, other: RunPredictions, groups: np.ndarray) -> dict[str, MetricComparison]:
    classes = pd.Index(first.images.class_names)
    labels, predicted_a, predicted_b = (
        classes.get_indexer(pd.Index(column))
        for column in (
            first.predictions["true_class"],
            first.predictions["predicted_class"],
            other.predictions["predicted_class"],
        )
    )
    return compare_class_metrics(labels, predicted_a, predicted_b, len(classes), groups)


def _changed_images(first: RunPredictions, other: RunPredictions) -> pd.DataFrame:
    """Return the changed images, sorted by direction, then by the confidence of the run that is wrong."""
    changed = np.flatnonzero(first.correct != other.correct)
    a, b = (run.predictions.iloc[changed].reset_index(drop=True) for run in (first, other))
    became_wrong = first.correct[changed]
    table = pd.DataFrame(
        {
            "key": a["key"],
            "true_class": a["true_class"],
            "turned": np.where(became_wrong, *DIRECTIONS),
            "predicted_a": a["predicted_class"],
            "probability_a": a["probability"],
            "predicted_b": b["predicted_class"],
            "probability_b": b["probability"],
        }
    )
    confidence = np.where(became_wrong, table["probability_b"], table["probability_a"])
    return table.iloc[np.lexsort((-confidence, ~became_wrong))].reset_index(drop=True)


def format_percent(share: float, num_images: int) -> str:
    """Format a share of images in percent, with as many digits as their number supports."""
    return f"{100 * share:.{_digits(num_images)}f}%"


def format_points(difference: float, num_images: int) -> str:
    """Format a difference of shares of images in percentage points, with its sign."""
    return f"{100 * difference:+.{_digits(num_images)}f}"


def _digits(num_images: int) -> int:
    return 1 if num_images < 2000 else 2


def _p(value: float) -> str:
    return f"= {value:.2g}" if value >= 1e-4 else "< 0.0001"


def _how_often(p_value: float) -> str:
    if p_value < 1e-6:
        return "in less than one of a million comparisons"
    if p_value < 0.1:
        return f"in 1 of {1 / p_value:,.0f} comparisons"
    return f"in {100 * p_value:.0f}% of comparisons" if p_value < 0.995 else "every time"

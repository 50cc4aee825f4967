"""Runs against each other on the same images: how much one is better, and how sure that is.

Two networks that saw the same images are compared image by image: what both get right or both get wrong says nothing of their difference.
McNemar's test asks how often chance alone would divide the rest as unevenly; a paired bootstrap says between what bounds the true
difference lies. Near-duplicates are no independent evidence, so the bootstrap draws whole groups of them; McNemar's test takes every
image for itself. A run counts as better only where both say so.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa

from pipeline.data.manifest import Manifest, differences
from pipeline.errors import RunError
from pipeline.evaluation.significance import ALPHA, PairedDifference, bootstrap, exact_bounds, holm, mcnemar

Verdict = Literal["better", "worse", "open"]


@dataclass(frozen=True, eq=False)
class RunPredictions:
    """A run's predictions, and the images that they are of.

    Attributes:
        name: Of the run.
        split: Of its data.
        predictions: As of `report.write_results`, a row per image.
        images: The same images in the same order, by key.
    """

    name: str
    split: str
    predictions: pd.DataFrame
    images: Manifest

    @property
    def right(self) -> np.ndarray:
        """Whether the predicted class is the true one, bool (N,)."""
        return (self.predictions["predicted_class"] == self.predictions["true_class"]).to_numpy()

    @property
    def losses(self) -> np.ndarray | None:
        """-log of the true class's probability in nats, float64 (N,); None where the predictions do not hold it."""
        if "true_probability" not in self.predictions:
            return None
        return -np.log(np.maximum(self.predictions["true_probability"].to_numpy(np.float64), np.finfo(np.float64).tiny))


def read_measured(name: str, split: str, predictions: Path, manifest: Path) -> RunPredictions:
    """Reads what a run said of a split.

    Args:
        name: Of the run.
        split: Of its data.
        predictions: The evaluation's Parquet file.
        manifest: The run's.

    Raises:
        RunError: The predictions cannot be read, or are not those of the manifest's images.
        DataError: The manifest cannot be read.
    """
    data = Manifest.load(manifest)
    try:
        rows = pd.read_parquet(predictions).sort_values("key", ignore_index=True)
        index, said = rows["index"].to_numpy(np.int64), rows[["key", "true_class", "predicted_class", "probability"]]
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{predictions}: cannot be read ({error}); measure the run again") from None
    if np.array_equal(np.sort(index), data.indices(split)):
        table = data.table.iloc[index].reset_index(drop=True)
        classes = np.array(data.class_names, object)[table["label"]]
        if said["key"].tolist() == table["key"].tolist() and said["true_class"].tolist() == classes.tolist():
            return RunPredictions(name, split, rows, Manifest(data.class_names, table))
    raise RunError(f"{predictions}: is not of the split {split} in {manifest}; measure the run again")


@dataclass(frozen=True, eq=False)
class RunComparison:
    """A run B beside a run A on the same N images.

    Attributes:
        a: Name of the run that B is compared with.
        b: Name of the run that is judged.
        split: Of the images.
        num_images: N.
        num_groups: Groups of near-duplicates among them; N where there are none.
        accuracies: Share of images right, A's and B's.
        only_a: Images that A alone has right.
        only_b: Images that B alone has right.
        p_value: Of McNemar's test, two-sided; adjusted by Holm's method where there are several pairs.
        num_pairs: Pairs that were tested together.
        accuracy: Difference of the accuracies, in [-1, 1]; its interval is the wider of the bootstrap's and `exact_bounds`.
        loss: Difference of the mean cross-entropies in nats, where the predictions tell.
        changed: The images that one run alone has right, a row each: key, true_class, turned ("right to wrong" or "wrong to right", from
            A to B), predicted_a, probability_a, predicted_b, probability_b.
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
    changed: pd.DataFrame

    @property
    def verdict(self) -> Verdict:
        """Whether B is better than A or worse; open where the test and the interval do not agree that there is a difference."""
        if self.p_value < ALPHA and self.accuracy.low > 0:
            return "better"
        if self.p_value < ALPHA and self.accuracy.high < 0:
            return "worse"
        return "open"

    @property
    def claim(self) -> str:
        """The verdict in words."""
        if self.verdict == "open":
            return f"These {self._images} do not tell {self.b} from {self.a}"
        return f"{self.b} is {self.verdict} than {self.a}"

    @property
    def evidence(self) -> str:
        """What the claim rests on and how sure it is, for a reader without statistics."""
        share_a, share_b = (percent(value, self.num_images) for value in self.accuracies)
        low, high = self.accuracy.low, self.accuracy.high
        if self.verdict == "open":
            return (
                f"{share_b} right against {share_a}. In truth {self.b} may be anything from {self._beside(low)} to {self._beside(high)} "
                f"(95 % interval). {self._chance()}"
            )
        nearer, farther = sorted((low, high), key=abs)
        return (
            f"{share_b} of the {self._images} right against {share_a}, {self._beside(self.accuracy.value)} (95 % interval "
            f"{self._points(nearer)} to {self._points(farther)}). {self._chance()}"
        )

    @property
    def sentence(self) -> str:
        """Both."""
        return f"{self.claim}: {self.evidence}"

    @property
    def _images(self) -> str:
        return f"{self.num_images:,} {self.split} images"

    def _chance(self) -> str:
        test = f"McNemar's test, p {_p(self.p_value)}"
        if self.num_pairs > 1:
            test += f", adjusted for {self.num_pairs} comparisons by Holm's method"
        text = f"Were the two equally good, chance alone would part them at least as far {_how_often(self.p_value)} ({test})."
        if self.verdict == "open" and self.p_value < ALPHA:
            text += " Image by image that would do; but near-duplicates are no independent evidence, and by groups the interval holds 0."
        return text

    def _points(self, difference: float) -> str:
        return f"{100 * abs(difference):.{_digits(self.num_images)}f}"

    def _beside(self, difference: float) -> str:
        return f"{self._points(difference)} points {'worse' if difference < 0 else 'better'}"

    def figures(self) -> dict[str, Any]:
        """Everything but the images, as JSON values."""
        names = ("a", "b", "split", "num_images", "num_groups", "only_a", "only_b", "p_value", "num_pairs", "verdict")
        return {
            **{name: getattr(self, name) for name in names},
            "accuracy_a": self.accuracies[0],
            "accuracy_b": self.accuracies[1],
            "accuracy_difference": self.accuracy._asdict(),
            "loss_difference": self.loss._asdict() if self.loss is not None else None,
            "sentence": self.sentence,
        }


def compare(runs: Sequence[RunPredictions]) -> list[RunComparison]:
    """Compares each run behind the first with the first.

    Args:
        runs: At least two, measured on the same images.

    Returns:
        A pair for each but the first, in their order.

    Raises:
        RunError: The images, their labels or their contents differ. The message lists what does.
    """
    first, *others = runs
    for other in others:
        _check_same_images(first, other)
    pairs = [_pair(first, other) for other in others]
    adjusted = holm([pair.p_value for pair in pairs])
    return [replace(pair, p_value=p_value, num_pairs=len(pairs)) for pair, p_value in zip(pairs, adjusted, strict=True)]


def _check_same_images(first: RunPredictions, other: RunPredictions) -> None:
    """Groups and sizes may differ: they change no prediction."""
    a, b = (Manifest(run.images.class_names, run.images.table.assign(split="test")) for run in (first, other))
    if found := differences(a, b):
        raise RunError(
            f"{first.name} ({len(a.table):,} {first.split} images) and {other.name} ({len(b.table):,}) cannot be compared: they were not "
            f"measured on the same images\nFrom the first to the second:\n{found}\n"
            "Where the data bring no splits, seed and data.splits choose the images: train both runs with the same, or give the data "
            "splits of their own (see data/README.md)."
        )


def _pair(first: RunPredictions, other: RunPredictions) -> RunComparison:
    right_a, right_b = first.right, other.right
    groups = min(
        (run.images.table["group"].to_numpy() for run in (first, other)), key=lambda each: len(np.unique(each))
    )
    num_groups = len(np.unique(groups))
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    drawn, (low, high) = (
        bootstrap(right_b.astype(np.float64) - right_a, groups),
        exact_bounds(only_a, only_b, len(groups), num_groups),
    )
    loss = None
    if first.losses is not None and other.losses is not None and num_groups > 1:
        loss = bootstrap(other.losses - first.losses, groups)
    return RunComparison(
        a=first.name,
        b=other.name,
        split=first.split,
        num_images=len(groups),
        num_groups=num_groups,
        accuracies=(float(right_a.mean()), float(right_b.mean())),
        only_a=only_a,
        only_b=only_b,
        p_value=mcnemar(only_a, only_b),
        num_pairs=1,
        accuracy=PairedDifference(drawn.value, min(drawn.low, low), max(drawn.high, high)),
        loss=loss,
        changed=_changed(first, other),
    )


def _changed(first: RunPredictions, other: RunPredictions) -> pd.DataFrame:
    """Sorted by what happened, then by how sure the run was that is wrong."""
    changed = np.flatnonzero(first.right != other.right)
    a, b = (run.predictions.iloc[changed].reset_index(drop=True) for run in (first, other))
    lost = first.right[changed]
    table = pd.DataFrame(
        {
            "key": a["key"],
            "true_class": a["true_class"],
            "turned": np.where(lost, "right to wrong", "wrong to right"),
            "predicted_a": a["predicted_class"],
            "probability_a": a["probability"],
            "predicted_b": b["predicted_class"],
            "probability_b": b["probability"],
        }
    )
    sure = np.where(lost, table["probability_b"], table["probability_a"])
    return table.iloc[np.lexsort((-sure, ~lost))].reset_index(drop=True)


def percent(share: float, of: int) -> str:
    """A share of so many images as it is shown, with as many digits as they bear."""
    return f"{100 * share:.{_digits(of)}f} %"


def signed(difference: float, of: int) -> str:
    """A difference of shares of so many images in points, as it is shown."""
    return f"{100 * difference:+.{_digits(of)}f}"


def _digits(images: int) -> int:
    return 1 if images < 2000 else 2


def _p(value: float) -> str:
    return f"= {value:.2g}" if value >= 1e-4 else "< 0.0001"


def _how_often(p_value: float) -> str:
    if p_value < 1e-6:
        return "in less than one of a million comparisons"
    if p_value < 0.1:
        return f"in 1 of {1 / p_value:,.0f} comparisons"
    return f"in {100 * p_value:.0f} % of comparisons" if p_value < 0.995 else "every time"

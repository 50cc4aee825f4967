"""All that was measured of a network on one split, with how sure it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pipeline.evaluation.batch_norm import BatchNormGap
from pipeline.evaluation.calibration import Calibration, calibration
from pipeline.evaluation.intervals import ConfidenceInterval, bootstrap
from pipeline.evaluation.label_errors import label_suspects
from pipeline.evaluation.metrics import Evaluation, Predictions


@dataclass(frozen=True)
class Results:
    """What is known of a split.

    Attributes:
        evaluation: The figures.
        predictions: What they were counted from.
        keys: Name of every image of the manifest: `predictions.index` points into it.
        intervals: 95 % intervals of the headline figures, by name.
        raw: How far the network's probabilities may be believed.
        scaled: The same with the temperature that was fitted on the validation split; None where there is none.
        suspects: Images whose label may be wrong, see `label_suspects`.
        batch_norm: What the moving statistics cost, where it was measured.
        corruptions: Accuracy on corrupted pictures, see `corruption_table`, where it was measured.
    """

    evaluation: Evaluation
    predictions: Predictions
    keys: Sequence[str]
    intervals: Mapping[str, ConfidenceInterval]
    raw: Calibration
    scaled: Calibration | None
    suspects: pd.DataFrame
    batch_norm: BatchNormGap | None = None
    corruptions: pd.DataFrame | None = None

    @property
    def class_names(self) -> list[str]:
        """In the order of the logits."""
        return self.evaluation.per_class["class"].tolist()

    def figures(self) -> dict[str, float]:
        """The figures that have intervals, by the intervals' names."""
        evaluation = self.evaluation
        return {
            "accuracy": evaluation.top1,
            "top5_accuracy": evaluation.top5,
            "balanced_accuracy": evaluation.balanced_accuracy,
            "macro_f1": evaluation.macro_f1,
            "loss": evaluation.loss,
            "brier": self.raw.brier,
            "overconfidence": self.raw.overconfidence,
        }

    def headline(self) -> dict[str, float]:
        """The figures for tracking, by names such as `test/accuracy` and `test/accuracy_low`."""
        values = {**self.figures(), "ece": self.raw.ece}
        for name, interval in self.intervals.items():
            values |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
        if self.scaled is not None:
            values |= {
                "temperature": self.scaled.temperature,
                "scaled_loss": self.scaled.loss,
                "scaled_ece": self.scaled.ece,
            }
        if self.batch_norm is not None:
            values["batch_norm_gap"] = self.batch_norm.batch - self.batch_norm.moving
        if self.corruptions is not None:
            values["corruption_accuracy"] = float(self.corruptions["mean"].mean())
        return {f"{self.evaluation.split}/{name}": value for name, value in values.items()}

    def to_json(self) -> dict[str, Any]:
        """The figures for `metrics.json`."""
        names = ("temperature", "loss", "brier", "overconfidence", "ece", "ece_by_chance")
        raw, scaled = (found and {name: getattr(found, name) for name in names} for found in (self.raw, self.scaled))
        return {
            "split": self.evaluation.split,
            "num_images": self.evaluation.num_images,
            **self.figures(),
            "intervals": {name: list(interval) for name, interval in self.intervals.items()},
            "calibration": raw,
            "temperature_scaled": scaled,
            "batch_norm": None if self.batch_norm is None else self.batch_norm._asdict(),
            "corruption_accuracy": None if self.corruptions is None else float(self.corruptions["mean"].mean()),
        }


def summarize_with_intervals(
    predictions: Predictions,
    evaluation: Evaluation,
    keys: Sequence[str],
    groups: np.ndarray | None,
    temperature: float | None,
) -> Results:
    """Adds to the figures of a split how sure they are.

    Args:
        predictions: Of N images.
        evaluation: Their figures.
        keys: Name of every image of the manifest.
        groups: int, of every image of the manifest, equal for near-duplicates: these are drawn together. None where all are alone.
        temperature: Fitted on another split, where there is one.
    """
    return Results(
        evaluation=evaluation,
        predictions=predictions,
        keys=keys,
        intervals=bootstrap(predictions, None if groups is None else groups[predictions.index]),
        raw=calibration(predictions),
        scaled=None if temperature is None else calibration(predictions, temperature),
        suspects=label_suspects(predictions, keys, evaluation.per_class["class"].tolist(), temperature or 1.0),
    )

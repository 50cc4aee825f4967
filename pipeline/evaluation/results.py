"""All results of a network on one split, with their confidence intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from pipeline.data.manifest import Manifest
from pipeline.evaluation.batch_norm import BatchNormGap
from pipeline.evaluation.calibration import Calibration, measure_calibration
from pipeline.evaluation.label_errors import find_label_errors
from pipeline.evaluation.metrics import Evaluation
from pipeline.evaluation.predictor import Predictions
from pipeline.evaluation.statistics import ConfidenceInterval, bootstrap_intervals


@dataclass(frozen=True)
class EvaluationResults:
    """The results on a split.

    Attributes:
        evaluation: The metrics.
        predictions: The predictions that they were computed from.
        keys: Name of every image of the manifest: `predictions.index` points into it.
        intervals: 95 % interval of each metric that has one, by name.
        raw: Calibration of the network's probabilities.
        scaled: Calibration with the temperature that was fitted on the validation split; None where there is none.
        label_errors: Images whose label may be wrong, see `find_label_errors`.
        batch_norm: Gap between moving and batch statistics, where it was measured.
        corruptions: Accuracy on corrupted images, see `corruption_table`, where it was measured.
    """

    evaluation: Evaluation
    predictions: Predictions
    keys: Sequence[str]
    intervals: Mapping[str, ConfidenceInterval]
    raw: Calibration
    scaled: Calibration | None
    label_errors: pd.DataFrame
    batch_norm: BatchNormGap | None = None
    corruptions: pd.DataFrame | None = None

    @property
    def class_names(self) -> list[str]:
        """The class names in the order of the logits."""
        return self.evaluation.per_class["class"].tolist()

    def scalar_metrics(self) -> dict[str, float]:
        """Return the values for tracking, by names such as `test/accuracy` and `test/accuracy_low`."""
        values = {**self.evaluation.metrics, "ece": self.raw.ece}
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
        """Return the content of `metrics.json`."""
        names = ("temperature", "loss", "brier", "overconfidence", "ece", "ece_by_chance")
        raw, scaled = (each and {name: getattr(each, name) for name in names} for each in (self.raw, self.scaled))
        return {
            "split": self.evaluation.split,
            "num_images": self.evaluation.num_images,
            **self.evaluation.metrics,
            "intervals": {name: list(interval) for name, interval in self.intervals.items()},
            "calibration": raw,
            "temperature_scaled": scaled,
            "batch_norm": None if self.batch_norm is None else self.batch_norm._asdict(),
            "corruption_accuracy": None if self.corruptions is None else float(self.corruptions["mean"].mean()),
        }


def summarize_with_intervals(
    predictions: Predictions, evaluation: Evaluation, manifest: Manifest, temperature: float | None
) -> EvaluationResults:
    """Add intervals, calibration and suspected label errors to the metrics of a split.

    Args:
        predictions: Of N images.
        evaluation: Their metrics.
        manifest: The images, with their keys; the bootstrap draws near-duplicates, a group, together.
        temperature: Fitted on another split, where there is one.
    """
    keys, groups = manifest.table["key"].tolist(), manifest.table["group"].to_numpy()
    return EvaluationResults(
        evaluation=evaluation,
        predictions=predictions,
        keys=keys,
        intervals=bootstrap_intervals(predictions, groups[predictions.index]),
        raw=measure_calibration(predictions),
        scaled=None if temperature is None else measure_calibration(predictions, temperature),
        label_errors=find_label_errors(predictions, keys, evaluation.per_class["class"].tolist()),
    )

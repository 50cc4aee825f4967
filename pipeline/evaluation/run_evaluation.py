"""How a finished network is measured and what is written of it, at the end of train.py as by evaluate.py."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import keras
import numpy as np

from pipeline.config.schema import Config
from pipeline.data.input_pipeline import evaluation_stream
from pipeline.data.manifest import Manifest
from pipeline.data.sources.base import DataSource
from pipeline.evaluation import tta as views
from pipeline.evaluation.batch_norm import batch_norm_gap
from pipeline.evaluation.calibration import fit_temperature
from pipeline.evaluation.grad_cam import GradCam
from pipeline.evaluation.metrics import Evaluation, Predictions, evaluate_predictions
from pipeline.evaluation.report.gallery import cards, most_confident_correct, worst_errors
from pipeline.evaluation.report.html_report import write_page
from pipeline.evaluation.report.tables import write_results
from pipeline.evaluation.results import Results, summarize_with_intervals
from pipeline.evaluation.robustness import corruption_passes, corruption_table
from pipeline.runs.run_directory import RunDirectory, write

PAIRED_BATCH = 64  # images whose statistics stand for the data's

Predict = Callable[..., Predictions]


@dataclass(frozen=True)
class RunEvaluator:
    """A run whose network is finished, with its data.

    Attributes:
        model: The network, float32 (B, R, R, 3) in [0, 255] to logits (B, K).
        config: The run's.
        run: Its directory.
        manifest: Its samples.
        source: Where their files are.
        predict: From a split, and what `evaluation_stream` takes beside it, to the network's predictions.
    """

    model: keras.Model
    config: Config
    run: RunDirectory
    manifest: Manifest
    source: DataSource
    predict: Predict

    @property
    def split(self) -> str:
        """The split that the run is to be judged by: test, or val where there is none."""
        return "test" if len(self.manifest.indices("test")) else "val"

    def predict_validation(self) -> Predictions | None:
        """What the network says of the validation split; None where there is none."""
        return self.predict("val") if len(self.manifest.indices("val")) else None

    def fit_temperature(self, predictions: Predictions | None) -> float | None:
        """Fits the temperature on the validation split's predictions and keeps it with the run; None where it cannot be settled."""
        if predictions is None:
            return None
        temperature = fit_temperature(predictions)
        fitted = {"temperature": temperature, "split": "val", "num_images": len(predictions.labels)}
        write(self.run.calibration, json.dumps(fitted, indent=1) + "\n")
        return temperature

    def temperature(self) -> float | None:
        """The one that is kept with the run; a run of an earlier version has it fitted now."""
        return (
            self.run.temperature() if self.run.calibration.exists() else self.fit_temperature(self.predict_validation())
        )

    def summarize_with_intervals(
        self, predictions: Predictions, evaluation: Evaluation, temperature: float | None
    ) -> Results:
        """Adds to the figures of a split how sure they are."""
        table = self.manifest.table
        return summarize_with_intervals(
            predictions, evaluation, table["key"].tolist(), table["group"].to_numpy(), temperature
        )

    def with_tta(self, split: str, name: str) -> Results:
        """Measures a split by test-time augmentation, `views.VIEWS[name]`; it goes by the name of both. Means have no temperature."""
        squares = views.squares(name, self.config.variant.resolution, self.config.data.resize)
        predictions = views.averaged([self.predict(split, square=square) for square in squares])
        return self.summarize_with_intervals(
            predictions, evaluate_predictions(predictions, self.manifest.class_names, f"{split}-{name}"), None
        )

    def with_corruptions(self, results: Results) -> Results:
        """Measures the split again with every kind of corruption at every severity."""
        accuracies = {}
        for kind, severity, square in corruption_passes(self.config.variant.resolution, self.config.data.resize):
            predictions = self.predict(results.evaluation.split, square=square)
            accuracies[kind, severity] = float((predictions.logits.argmax(axis=1) == predictions.labels).mean())
        return replace(results, corruptions=corruption_table(accuracies))

    def with_batch_norm_gap(self, results: Results) -> Results:
        """Measures what the moving statistics cost, on as many whole batches as the split gives."""
        rows = np.random.default_rng(0).permutation(results.predictions.index)
        size = min(PAIRED_BATCH, len(rows))
        whole = rows[: len(rows) - len(rows) % size]
        dataset = evaluation_stream(self.manifest, self.source, self.config, self.split, batch_size=size, rows=whole)
        return replace(results, batch_norm=batch_norm_gap(self.model, dataset))

    def write(self, results: Results) -> None:
        """Writes the figures into the run's evaluation/<split>, and a page of them into its report."""
        name = results.evaluation.split
        write_results(results, self.run.evaluation(name))
        grad_cam = GradCam(self.model)
        galleries = {
            "Worst errors": cards(results, worst_errors(results), self.images, grad_cam),
            "Most confident right ones": cards(results, most_confident_correct(results), self.images, grad_cam),
        }
        folder = self.run.evaluation(name)
        figures = {
            "Training": self.run.report / "training_curves.png",
            "Confusion matrix": folder / "confusion_matrix.png",
            "Reliability": folder / "reliability.png",
            **({} if results.corruptions is None else {"Corrupted pictures": folder / "corruptions.png"}),
            "A batch as it is fed to the network": self.run.report / "first_batch.png",
        }
        write_page(self.page(name), str(self.run.path), results, figures, galleries, self.config.to_yaml())

    def page(self, name: str) -> Path:
        """Where the page of a split is written: the run's report, for the split that it is to be judged by."""
        return self.run.page if name == self.split else self.run.report / f"{name}.html"

    def images(self, indices: np.ndarray) -> np.ndarray:
        """The squares that the network sees of some images of the manifest, uint8 (N, R, R, 3)."""
        [(images, *_)] = evaluation_stream(
            self.manifest, self.source, self.config, self.split, batch_size=len(indices), rows=indices
        ).as_numpy_iterator()
        return images

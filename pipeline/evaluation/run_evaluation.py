"""The evaluation of a trained network and its output files, at the end of training and by evaluate.py."""

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
from pipeline.evaluation import tta
from pipeline.evaluation.batch_norm import batch_norm_gap
from pipeline.evaluation.calibration import fit_temperature
from pipeline.evaluation.grad_cam import GradCam
from pipeline.evaluation.metrics import evaluate_predictions
from pipeline.evaluation.predictor import Predictions
from pipeline.evaluation.report.gallery import gallery_items, most_confident_correct, worst_errors
from pipeline.evaluation.report.html_report import write_report
from pipeline.evaluation.report.tables import write_results
from pipeline.evaluation.results import EvaluationResults, summarize_with_intervals
from pipeline.evaluation.robustness import corruption_preprocess_fns, corruption_table
from pipeline.files import atomic_write
from pipeline.runs.run_directory import RunDirectory
from pipeline.tasks import TASKS

BATCH_NORM_BATCH_SIZE = 64  # images; their statistics stand for those of the data

Predict = Callable[..., Predictions]


@dataclass(frozen=True)
class RunEvaluator:
    """The evaluator of a run whose network is trained.

    Attributes:
        model: The network, float32 (B, R, R, 3) in [0, 255] to logits (B, K).
        config: Config of the run.
        run: Directory of the run.
        manifest: Manifest of the run.
        source: Source of the image files.
        predict: Maps a split, and further arguments of `evaluation_stream`, to the network's predictions.
    """

    model: keras.Model
    config: Config
    run: RunDirectory
    manifest: Manifest
    source: DataSource
    predict: Predict

    @property
    def split(self) -> str:
        """The split that the run is evaluated on."""
        return self.manifest.evaluation_split

    def predict_validation(self) -> Predictions | None:
        """Predict the validation split; None where there is none."""
        return self.predict("val") if len(self.manifest.indices("val")) else None

    def fit_temperature(self, predictions: Predictions | None) -> float | None:
        """Fit the temperature on the validation split and save it with the run; None where it cannot be determined."""
        if predictions is None:
            return None
        temperature = fit_temperature(predictions)
        record = {"temperature": temperature, "split": "val", "num_images": len(predictions.labels)}
        atomic_write(self.run.calibration, json.dumps(record, indent=1) + "\n")
        return temperature

    def temperature(self) -> float | None:
        """Return the temperature saved with the run, fitted now if the run has none."""
        return (
            self.run.temperature() if self.run.calibration.exists() else self.fit_temperature(self.predict_validation())
        )

    def with_tta(self, split: str, name: str) -> EvaluationResults:
        """Evaluate a split with the views `tta.VIEWS[name]`, named split-name; means have no temperature."""
        preprocess_fns = tta.tta_preprocess_fns(name, self.config.variant.resolution, self.config.data.resize)
        predictions = tta.average_predictions(
            [self.predict(split, preprocess_fn=preprocess_fn) for preprocess_fn in preprocess_fns]
        )
        evaluation = evaluate_predictions(predictions, self.manifest.class_names, f"{split}-{name}")
        return summarize_with_intervals(predictions, evaluation, self.manifest, None)

    def with_corruptions(self, results: EvaluationResults) -> EvaluationResults:
        """Evaluate the split with every kind of corruption at every severity."""
        accuracies = {}
        for kind, severity, preprocess_fn in corruption_preprocess_fns(
            self.config.variant.resolution, self.config.data.resize
        ):
            predictions = self.predict(results.evaluation.split, preprocess_fn=preprocess_fn)
            accuracies[kind, severity] = float((predictions.decisions == predictions.labels).mean())
        return replace(results, corruptions=corruption_table(accuracies))

    def with_batch_norm_gap(self, results: EvaluationResults) -> EvaluationResults:
        """Measure the gap between moving and batch statistics, on as many full batches as the split has.

        A run that kept the statistics of its weights has none: it never normalized with those of a batch.
        """
        if not any(stage.trains_batch_norm for stage in self.config.train.stages):
            return results
        rows = np.random.default_rng(0).permutation(results.predictions.index)
        size = min(BATCH_NORM_BATCH_SIZE, len(rows))
        rows = rows[: len(rows) - len(rows) % size]
        dataset = evaluation_stream(self.manifest, self.source, self.config, rows, batch_size=size)
        return replace(results, batch_norm=batch_norm_gap(self.model, dataset, TASKS[self.config.task]))

    def write(self, results: EvaluationResults) -> None:
        """Write the results into the run's evaluation/<split>, and their report into its report folder."""
        name = results.evaluation.split
        write_results(results, self.run.evaluation(name))
        grad_cam = GradCam(self.model)
        galleries = {
            "Worst errors": gallery_items(results, worst_errors(results), self.load_images, grad_cam),
            "Most confident correct images": gallery_items(
                results, most_confident_correct(results), self.load_images, grad_cam
            ),
        }
        folder = self.run.evaluation(name)
        figures = {
            "Training": self.run.report / "training_curves.png",
            "Confusion matrix": folder / "confusion_matrix.png",
            "Reliability": folder / "reliability.png",
            **({} if results.corruptions is None else {"Corrupted images": folder / "corruptions.png"}),
            "First training batch": self.run.report / "first_batch.png",
        }
        write_report(self.report_path(name), str(self.run.path), results, figures, galleries, self.config.to_yaml())

    def report_path(self, name: str) -> Path:
        """Return the path of a split's report: the main report for the split that the run is evaluated on."""
        return self.run.html_report if name == self.split else self.run.report / f"{name}.html"

    def load_images(self, indices: np.ndarray) -> np.ndarray:
        """Load images of the manifest as the network sees them, uint8 (N, R, R, 3)."""
        [(images, *_)] = evaluation_stream(
            self.manifest, self.source, self.config, indices, batch_size=len(indices)
        ).as_numpy_iterator()
        return images

"""The result files of an evaluation and its table on the console."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Group
from rich.table import Table
from rich.text import Text

from pipeline.console import plural
from pipeline.evaluation.calibration import PerImageScores
from pipeline.evaluation.metrics import METRICS
from pipeline.evaluation.predict import top_k
from pipeline.evaluation.report.figures import (
    MAX_CLASSES_IN_FULL,
    confusion_figure,
    corruption_figure,
    reliability_figure,
)
from pipeline.evaluation.results import EvaluationResults
from pipeline.files import atomic_path, atomic_write

NUM_WORST_CLASSES = 5


def write_results(results: EvaluationResults, directory: Path) -> None:
    """Write the results of a split, each file completely or not at all.

    `metrics.json` holds the metrics, their intervals and the calibration; `per_class.csv` a row per class;
    `confusion_matrix.csv` and `.png` the counts (rows are true classes); `reliability.csv` and `.png` a row per bin of
    confidence; `label_errors.csv` the images whose label may be wrong; `corruptions.csv` and `.png`, where measured,
    the accuracy on corrupted images; `predictions.parquet` a row per image: index, key, true_class, predicted_class,
    probability (of the predicted class), true_probability (of the true class), and top5_classes with
    top5_probabilities, the most probable first.

    Args:
        results: Of one split.
        directory: Output directory; created if missing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    evaluation, names = results.evaluation, results.class_names
    atomic_write(directory / "metrics.json", json.dumps(results.to_json(), indent=2) + "\n")
    tables = {"per_class": evaluation.per_class, "reliability": results.raw.bins, "label_errors": results.label_errors}
    for name, rows in tables.items():
        with atomic_path(directory / f"{name}.csv") as path:
            rows.to_csv(path, index=False)
    with atomic_path(directory / "confusion_matrix.csv") as path:
        pd.DataFrame(evaluation.confusion, index=pd.Index(names, name="true class"), columns=names).to_csv(path)
    with atomic_path(directory / "predictions.parquet") as path:
        _prediction_table(results).to_parquet(path, index=False)
    save_figure(confusion_figure(evaluation), directory / "confusion_matrix.png")
    calibrations = {"uncalibrated": results.raw}
    if results.scaled is not None:
        calibrations[f"logits divided by {results.scaled.temperature:.2f}"] = results.scaled
    save_figure(reliability_figure(calibrations), directory / "reliability.png")
    if results.corruptions is not None:
        with atomic_path(directory / "corruptions.csv") as path:
            results.corruptions.to_csv(path)
        save_figure(corruption_figure(results.corruptions, evaluation.accuracy), directory / "corruptions.png")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, completely or not at all; its folder is created if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight")


def _prediction_table(results: EvaluationResults) -> pd.DataFrame:
    predictions, names = results.predictions, results.class_names
    top = top_k(predictions.logits, names, 5, predictions.task)
    return pd.DataFrame(
        {
            "index": predictions.index,
            "key": [results.keys[i] for i in predictions.index],
            "true_class": [names[i] for i in predictions.labels],
            "predicted_class": [labels[0].name for labels in top],
            "probability": [labels[0].probability for labels in top],
            "true_probability": PerImageScores.from_predictions(predictions).true_probability,
            "top5_classes": [[label.name for label in labels] for labels in top],
            "top5_probabilities": [[label.probability for label in labels] for labels in top],
        }
    )


def metric_rows(results: EvaluationResults) -> list[tuple[str, str, str]]:
    """Format the metrics for reports.

    Returns:
        Title, value and 95 % interval of each metric that the number of classes gives a meaning; a dash where the
        images do not tell the interval.
    """
    rows = []
    for name, value in results.evaluation.metrics.items():
        spec = METRICS[name]
        if len(results.class_names) >= spec.min_classes:
            bounds = results.intervals.get(name)
            interval = " to ".join(spec.format.format(bound) for bound in bounds) if bounds is not None else "-"
            rows.append((spec.title, spec.format.format(value), interval))
    return rows


def summary_sentences(results: EvaluationResults) -> list[str]:
    """Summarize calibration, batch normalization, corruptions and suspected labels, a sentence each."""
    raw, scaled = results.raw, results.scaled
    sentences = [
        f"Calibration error {raw.ece:.2%}; a perfectly calibrated model would show {raw.ece_by_chance:.2%} on so few "
        "images."
    ]
    if scaled is not None:
        sentences.append(
            f"With logits divided by the temperature {scaled.temperature:.2f}, fitted on the validation split, "
            f"calibration error {scaled.ece:.2%} (perfectly calibrated: {scaled.ece_by_chance:.2%}), overconfidence "
            f"{scaled.overconfidence:+.2%}, loss {scaled.loss:.4f}. Probabilities elsewhere in the results, in "
            "exports and in predictions are those of the model, not divided."
        )
    if results.batch_norm is not None:
        moving, batch = results.batch_norm
        sentences.append(
            f"Batch normalization: accuracy {moving:.2%} with the moving statistics, {batch:.2%} with the statistics "
            "of each batch, as in training."
        )
    if results.corruptions is not None:
        accuracy = results.corruptions["mean"].mean()
        sentences.append(f"The accuracy on corrupted images (eight kinds, five severities) is {accuracy:.2%}.")
    if len(results.label_errors):
        sentences.append(f"{len(results.label_errors):,} of the {results.evaluation.num_images:,} labels may be wrong.")
    return sentences


def metrics_table(results: EvaluationResults) -> Group:
    """Create the console's table of metrics and classes: all classes up to 20, else the five with the lowest F1."""
    evaluation = results.evaluation
    per_class = evaluation.per_class
    present = per_class[per_class["support"] > 0]
    all_shown = len(per_class) <= MAX_CLASSES_IN_FULL
    shown = per_class if all_shown else present.nsmallest(NUM_WORST_CLASSES, "f1")
    headline = Text.assemble(
        (f"{evaluation.split}: ", "bold"),
        f"{plural(evaluation.num_images, 'image')}, accuracy ",
        (f"{evaluation.accuracy:.2%}", "bold green"),
    )
    metrics = Table(box=None, pad_edge=False)
    for column in ("", "", "95% interval"):
        metrics.add_column(column, justify="left" if column else "right", header_style="dim")
    metrics.columns[0].justify = "left"
    for row in metric_rows(results):
        metrics.add_row(*row)
    title = [] if all_shown else [Text(f"the {len(shown)} classes with the lowest F1, of {len(per_class)}:")]
    classes = Table(box=None, pad_edge=False)
    for column in ("class", "precision", "recall", "F1", "images"):
        classes.add_column(column, justify="left" if column == "class" else "right", header_style="dim")
    for row in shown.itertuples(index=False):
        name, precision, recall, f1, support = row
        classes.add_row(
            Text(str(name)),
            *("-" if np.isnan(value) else f"{value:.3f}" for value in (precision, recall, f1)),
            f"{support:,}",
        )
    return Group(headline, metrics, *title, classes, *map(Text, summary_sentences(results)))

"""What an evaluation leaves behind: its files, and a table for the screen."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Group
from rich.table import Table
from rich.text import Text

from pipeline.evaluation.calibration import PerImageScores
from pipeline.evaluation.predict import top_k
from pipeline.evaluation.report.figures import ALL_CLASSES, confusion_figure, corruption_figure, reliability_figure
from pipeline.evaluation.results import Results

WORST_CLASSES = 5
TITLES = {
    "accuracy": "accuracy",
    "top5_accuracy": "top 5 accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "loss": "loss (nats)",
    "brier": "Brier score",
    "overconfidence": "overconfidence",
}


def write_results(results: Results, directory: Path) -> None:
    """Writes what was measured of a split, each file whole or not at all.

    `metrics.json` holds the headline figures, their intervals and the calibration, `per_class.csv` a row per class, `confusion_matrix.csv`
    and `.png` the counts (rows are true classes), `reliability.csv` and `.png` a row per bin of confidence, `label_suspects.csv` the images
    whose label may be wrong, `corruptions.csv` and `.png`, where they were measured, the accuracy on corrupted pictures, and
    `predictions.parquet` a row per image: index, key, true_class, predicted_class, probability (of the predicted class), true_probability
    (of the true one), and top5_classes with top5_probabilities, the most probable first.

    Args:
        results: Of one split.
        directory: Where to; made if missing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    evaluation, names = results.evaluation, results.class_names
    with whole(directory / "metrics.json") as path:
        path.write_text(json.dumps(results.to_json(), indent=2) + "\n")
    tables = {"per_class": evaluation.per_class, "reliability": results.raw.bins, "label_suspects": results.suspects}
    for name, rows in tables.items():
        with whole(directory / f"{name}.csv") as path:
            rows.to_csv(path, index=False)
    with whole(directory / "confusion_matrix.csv") as path:
        pd.DataFrame(evaluation.confusion, index=pd.Index(names, name="true class"), columns=names).to_csv(path)
    with whole(directory / "predictions.parquet") as path:
        _prediction_rows(results).to_parquet(path, index=False)
    save(confusion_figure(evaluation), directory / "confusion_matrix.png")
    calibrations = {"as the network says": results.raw}
    if results.scaled is not None:
        calibrations[f"logits divided by {results.scaled.temperature:.2f}"] = results.scaled
    save(reliability_figure(calibrations), directory / "reliability.png")
    if results.corruptions is not None:
        with whole(directory / "corruptions.csv") as path:
            results.corruptions.to_csv(path)
        save(corruption_figure(results.corruptions, evaluation.top1), directory / "corruptions.png")


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG, whole or not at all; its folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as aside:
        figure.savefig(aside, format="png", bbox_inches="tight")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside the given one, which takes its place once the block has succeeded."""
    aside = path.with_name(f".new-{path.name}")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _prediction_rows(results: Results) -> pd.DataFrame:
    predictions, names = results.predictions, results.class_names
    top = top_k(predictions.logits, names, 5)
    return pd.DataFrame(
        {
            "index": predictions.index,
            "key": [results.keys[i] for i in predictions.index],
            "true_class": [names[i] for i in predictions.labels],
            "predicted_class": [labels[0].name for labels in top],
            "probability": [labels[0].probability for labels in top],
            "true_probability": PerImageScores.of(predictions).true_probability,
            "top5_classes": [[label.name for label in labels] for labels in top],
            "top5_probabilities": [[label.probability for label in labels] for labels in top],
        }
    )


def metric_rows(results: Results) -> list[tuple[str, str, str]]:
    """The headline figures for people: title, value, 95 % interval."""
    few = len(results.class_names) <= 5
    rows = []
    for name, value in results.figures().items():
        if not (few and name == "top5_accuracy"):
            low, high = results.intervals[name]
            written = (
                "{:.4f}" if name in ("loss", "brier") else "{:+.2%}" if name == "overconfidence" else "{:.2%}"
            ).format
            rows.append((TITLES[name], written(value), f"{written(low)} to {written(high)}"))
    return rows


def summary_sentences(results: Results) -> list[str]:
    """What else there is to say of a network, a sentence each."""
    raw, scaled = results.raw, results.scaled
    said = [f"Calibration error {raw.ece:.2%}, of which chance alone would give {raw.ece_by_chance:.2%}."]
    if scaled is not None:
        said.append(
            f"With the logits divided by {scaled.temperature:.2f}, as fits the validation split best: calibration error {scaled.ece:.2%} "
            f"(by chance {scaled.ece_by_chance:.2%}), overconfidence {scaled.overconfidence:+.2%}, loss {scaled.loss:.4f}."
        )
    if results.batch_norm is not None:
        moving, batch = results.batch_norm
        said.append(
            f"Batch normalisation: accuracy {moving:.2%} by the moving statistics, {batch:.2%} by those of each batch, as in training."
        )
    if results.corruptions is not None:
        said.append(
            f"On corrupted pictures of eight kinds and five severities the accuracy is {results.corruptions['mean'].mean():.2%}."
        )
    if len(results.suspects):
        said.append(f"{len(results.suspects):,} of the {results.evaluation.num_images:,} labels may be wrong.")
    return said


def table(results: Results) -> Group:
    """The headline figures and the classes for the screen: all of them up to 20, else the five with the lowest F1."""
    evaluation = results.evaluation
    per_class = evaluation.per_class
    present = per_class[per_class["support"] > 0]
    every = len(per_class) <= ALL_CLASSES
    shown = per_class if every else present.nsmallest(WORST_CLASSES, "f1")
    headline = Text.assemble(
        (f"{evaluation.split}: ", "bold"),
        f"{evaluation.num_images:,} images, accuracy ",
        (f"{evaluation.top1:.2%}", "bold green"),
    )
    figures = Table(box=None, pad_edge=False)
    for column in ("", "", "95 % interval"):
        figures.add_column(column, justify="left" if column else "right", header_style="dim")
    figures.columns[0].justify = "left"
    for row in metric_rows(results):
        figures.add_row(*row)
    title = [] if every else [Text(f"the {len(shown)} classes with the lowest F1, of {len(per_class)}:")]
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
    return Group(headline, figures, *title, classes, *map(Text, summary_sentences(results)))

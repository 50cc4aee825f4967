"""What an evaluation leaves behind: its files, its figures, and a table for the screen."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, ScalarFormatter
from rich.console import Group
from rich.table import Table
from rich.text import Text

from pipeline.evaluation.metrics import Evaluation, Predictions
from pipeline.evaluation.predict import top_k

ALL_CLASSES = 20  # up to so many the screen shows every class and the confusion matrix every count
NAMED_CLASSES = 60  # up to so many fit as names along the confusion matrix
WORST_CLASSES = 5
COLOURS = {"train": "#0072B2", "val": "#D55E00", "top5": "#009E73", "rate": "#555555"}  # Okabe and Ito 2008, distinct to the colour-blind


def write_evaluation(evaluation: Evaluation, predictions: Predictions, keys: Sequence[str], directory: Path) -> None:
    """Writes an evaluation, each file whole or not at all.

    `metrics.json` holds the headline figures, `per_class.csv` a row per class, `confusion_matrix.csv` and `.png` the counts (rows are true
    classes), `predictions.parquet` a row per image: index, key, true_class, predicted_class, probability (of the predicted class), and
    top5_classes with top5_probabilities, the most probable first.

    Args:
        evaluation: Of one split.
        predictions: What it was counted from.
        keys: Name of every image of the manifest, in the manifest's order: `predictions.index` points into it.
        directory: Where to; made if missing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    names = evaluation.per_class["class"].tolist()
    figures = {key.removeprefix(f"{evaluation.split}/"): value for key, value in evaluation.headline().items()}
    with _whole(directory / "metrics.json") as path:
        path.write_text(json.dumps({"split": evaluation.split, "num_images": evaluation.num_images, **figures}, indent=2) + "\n")
    with _whole(directory / "per_class.csv") as path:
        evaluation.per_class.to_csv(path, index=False)
    with _whole(directory / "confusion_matrix.csv") as path:
        pd.DataFrame(evaluation.confusion, index=pd.Index(names, name="true class"), columns=names).to_csv(path)
    with _whole(directory / "predictions.parquet") as path:
        _prediction_rows(predictions, keys, names).to_parquet(path, index=False)
    with _whole(directory / "confusion_matrix.png") as path:
        confusion_figure(evaluation).savefig(path, format="png", bbox_inches="tight")


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A path beside the given one, which takes its place once the block has succeeded."""
    aside = path.with_name(f".new-{path.name}")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _prediction_rows(predictions: Predictions, keys: Sequence[str], names: Sequence[str]) -> pd.DataFrame:
    top = top_k(predictions.logits, names, 5)
    return pd.DataFrame(
        {
            "index": predictions.index,
            "key": [keys[i] for i in predictions.index],
            "true_class": [names[i] for i in predictions.labels],
            "predicted_class": [labels[0].name for labels in top],
            "probability": [labels[0].probability for labels in top],
            "top5_classes": [[label.name for label in labels] for labels in top],
            "top5_probabilities": [[label.probability for label in labels] for labels in top],
        }
    )


def confusion_figure(evaluation: Evaluation) -> Figure:
    """The confusion matrix as shares of each true class: counts up to 20 classes, names up to 60, beyond that the picture alone.

    Returns:
        The figure. Empty rows belong to classes of which the split has no image.
    """
    counts, names = evaluation.confusion, evaluation.per_class["class"].tolist()
    n = len(names)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(2.5 + (0.45 if n <= ALL_CLASSES else 0.2) * n, 5, 14)) if n <= NAMED_CLASSES else 12.0
    figure = Figure(figsize=(side + 1, side), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    norm = PowerNorm(0.5, 0, 1)
    if n <= NAMED_CLASSES:
        axes.imshow(shares, cmap="Blues", norm=norm, interpolation="nearest")
        axes.set_xticks(range(n), names, rotation=90, parse_math=False)
        axes.set_yticks(range(n), names, parse_math=False)
        axes.set_xticks(np.arange(n + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(n + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="0.9", linewidth=0.5)
        axes.tick_params(which="minor", length=0)
        colours = ScalarMappable(norm, "Blues")
    else:  # a cell may be smaller than a pixel: markers of a fixed size keep single confusions visible, the frequent ones on top
        true, predicted = np.nonzero(counts)
        order = np.argsort(shares[true, predicted])
        true, predicted = true[order], predicted[order]
        colours = ScalarMappable(norm, ListedColormap(colormaps["viridis_r"](np.linspace(0.3, 1, 256))))  # its yellow is lost on white
        size = max(2.5, (0.72 * 72 * side / n) ** 2)
        axes.scatter(predicted, true, c=colours.to_rgba(shares[true, predicted]), s=size, marker="s", linewidths=0)
        axes.set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -0.5), aspect="equal")
    if n <= ALL_CLASSES:
        for row, column in zip(*np.nonzero(counts), strict=True):
            light = shares[row, column] > 0.3
            axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", color="white" if light else "black", fontsize=9)
    unit = "" if n <= NAMED_CLASSES else " (number of the class)"
    axes.set(xlabel=f"predicted class{unit}", ylabel=f"true class{unit}")
    axes.set_title(f"{evaluation.split}: {evaluation.num_images:,} images, {evaluation.top1:.1%} right")
    ticks = [0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1]
    bar = figure.colorbar(colours, ax=axes, fraction=0.046, pad=0.02, ticks=ticks, format=PercentFormatter(1, decimals=0))
    bar.set_label("share of the true class")
    return figure


def write_training_curves(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draws loss, accuracy and learning rate over the epochs.

    Args:
        history: A record per epoch, as the training loop keeps them: epoch, train/loss, train/accuracy, learning_rate, and val/loss,
            val/accuracy, val/top5_accuracy where there is a validation split.
        path: The PNG to write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(12, 3.8), dpi=150, layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    _curve(loss, history, "train/loss", "training", COLOURS["train"], "o-")
    _curve(loss, history, "val/loss", "validation", COLOURS["val"], "s--")
    loss.set(ylabel="loss (nats)", title="Loss")
    _curve(accuracy, history, "train/accuracy", "training", COLOURS["train"], "o-")
    _curve(accuracy, history, "val/accuracy", "validation", COLOURS["val"], "s--")
    _curve(accuracy, history, "val/top5_accuracy", "validation, top 5", COLOURS["top5"], "^:")
    accuracy.set(ylabel="share of images right", title="Accuracy")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    _curve(rate, history, "learning_rate", "", COLOURS["rate"], "o-")
    rate.set(ylabel="learning rate at the end of the epoch", title="Learning rate")
    rate.set_ylim(0, 1.05 * rate.get_ylim()[1])
    rate.yaxis.set_major_formatter(ScalarFormatter(useMathText=True))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    for axes in (loss, accuracy, rate):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if axes is not rate:
            axes.legend(frameon=False)
    with _whole(path) as aside:
        figure.savefig(aside, format="png")


def _curve(axes: Axes, history: Sequence[Mapping[str, float]], key: str, label: str, colour: str, style: str) -> None:
    points = [(record["epoch"], record[key]) for record in history if key in record]
    if points:
        every = max(1, len(points) // 15)
        axes.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=4, markevery=every, linewidth=1.5)


def table(evaluation: Evaluation) -> Group:
    """The headline figures and the classes for the screen: all of them up to 20, else the five with the lowest F1."""
    per_class = evaluation.per_class
    present = per_class[per_class["support"] > 0]
    every = len(per_class) <= ALL_CLASSES
    shown = per_class if every else present.nsmallest(WORST_CLASSES, "f1")
    headline = Text.assemble(
        (f"{evaluation.split}: ", "bold"),
        f"{evaluation.num_images:,} images, accuracy ",
        (f"{evaluation.top1:.2%}", "bold green"),
        *([f", top 5 {evaluation.top5:.2%}"] if len(per_class) > 5 else []),
        f", balanced accuracy {evaluation.balanced_accuracy:.2%}, macro F1 {evaluation.macro_f1:.3f}, loss {evaluation.loss:.4f}",
    )
    title = [] if every else [Text(f"the {len(shown)} classes with the lowest F1, of {len(per_class)}:")]
    classes = Table(box=None)
    for column in ("class", "precision", "recall", "F1", "images"):
        classes.add_column(column, justify="left" if column == "class" else "right", header_style="dim")
    for row in shown.itertuples(index=False):
        name, precision, recall, f1, support = row
        classes.add_row(Text(str(name)), *("-" if np.isnan(value) else f"{value:.3f}" for value in (precision, recall, f1)), f"{support:,}")
    return Group(headline, *title, classes)

"""Figures of a report, drawn with matplotlib."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, ScalarFormatter

from pipeline.console import plural
from pipeline.evaluation.calibration import Calibration
from pipeline.evaluation.metrics import Evaluation

MAX_CLASSES_IN_FULL = 20  # the console then shows every class, the confusion matrix every count
MAX_BATCH_IMAGES = 16  # images of a batch that are shown
MAX_CLASS_NAMES = 60  # class names that fit along the confusion matrix
COLORS = {
    "train": "#0072B2",
    "val": "#D55E00",
    "top5": "#009E73",
    "rate": "#555555",
}  # Okabe and Ito 2008, distinguishable by color-blind people


def confusion_figure(evaluation: Evaluation) -> Figure:
    """Draw the confusion matrix as proportions of each true class.

    Counts are shown up to 20 classes, class names up to 60.

    Returns:
        The figure. Empty rows belong to classes of which the split has no image.
    """
    counts, names = evaluation.confusion, evaluation.per_class["class"].tolist()
    n = len(names)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = (
        float(np.clip(2.5 + (0.45 if n <= MAX_CLASSES_IN_FULL else 0.2) * n, 5, 14)) if n <= MAX_CLASS_NAMES else 12.0
    )
    figure = Figure(figsize=(side + 1, side), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    norm = PowerNorm(0.5, 0, 1)
    if n <= MAX_CLASS_NAMES:
        axes.imshow(shares, cmap="Blues", norm=norm, interpolation="nearest")
        axes.set_xticks(range(n), names, rotation=90, parse_math=False)
        axes.set_yticks(range(n), names, parse_math=False)
        axes.set_xticks(np.arange(n + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(n + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="0.9", linewidth=0.5)
        axes.tick_params(which="minor", length=0)
        colors = ScalarMappable(norm, "Blues")
    else:
        # A cell may be smaller than a pixel: markers of a fixed size keep single confusions visible. The most frequent
        # ones are drawn on top.
        true, predicted = np.nonzero(counts)
        order = np.argsort(shares[true, predicted])
        true, predicted = true[order], predicted[order]
        # The yellow end of the color map is invisible on white.
        colors = ScalarMappable(norm, ListedColormap(colormaps["viridis_r"](np.linspace(0.3, 1, 256))))
        size = max(2.5, (0.72 * 72 * side / n) ** 2)
        axes.scatter(predicted, true, c=colors.to_rgba(shares[true, predicted]), s=size, marker="s", linewidths=0)
        axes.set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -0.5), aspect="equal")
    if n <= MAX_CLASSES_IN_FULL:
        for row, column in zip(*np.nonzero(counts), strict=True):
            light = shares[row, column] > 0.3
            axes.text(
                column,
                row,
                f"{counts[row, column]}",
                ha="center",
                va="center",
                color="white" if light else "black",
                fontsize=9,
            )
    unit = "" if n <= MAX_CLASS_NAMES else " (number of the class)"
    axes.set(xlabel=f"predicted class{unit}", ylabel=f"true class{unit}")
    axes.set_title(f"{evaluation.split}: {plural(evaluation.num_images, 'image')}, accuracy {evaluation.accuracy:.1%}")
    ticks = [0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1]
    bar = figure.colorbar(
        colors, ax=axes, fraction=0.046, pad=0.02, ticks=ticks, format=PercentFormatter(1, decimals=0)
    )
    bar.set_label("proportion of the true class")
    return figure


def training_figure(history: Sequence[Mapping[str, float]]) -> Figure:
    """Draw loss, accuracy and learning rate over the epochs.

    Args:
        history: A record per epoch, as written by the trainer: epoch, train/loss, train/accuracy, learning_rate, and
            val/loss, val/accuracy, val/top5_accuracy where there is a validation split.
    """
    figure = Figure(figsize=(12, 3.8), dpi=150, layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    curve(loss, history, "train/loss", "training", COLORS["train"], "o-")
    curve(loss, history, "val/loss", "validation", COLORS["val"], "s--")
    loss.set(ylabel="loss (nats)", title="Loss")
    curve(accuracy, history, "train/accuracy", "training", COLORS["train"], "o-")
    curve(accuracy, history, "val/accuracy", "validation", COLORS["val"], "s--")
    curve(accuracy, history, "val/top5_accuracy", "validation, top 5", COLORS["top5"], "^:")
    accuracy.set(ylabel="proportion of correct images", title="Accuracy")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    curve(rate, history, "learning_rate", "", COLORS["rate"], "o-")
    rate.set(ylabel="learning rate at the end of the epoch", title="Learning rate")
    rate.set_ylim(0, 1.05 * rate.get_ylim()[1])
    rate.yaxis.set_major_formatter(ScalarFormatter(useMathText=True))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    for axes in (loss, accuracy, rate):
        format_epoch_axis(axes)
        if axes is not rate:
            axes.legend(frameon=False)
    return figure


def format_epoch_axis(axes: Axes) -> None:
    """Format axes for curves over the epochs."""
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def curve(axes: Axes, history: Sequence[Mapping[str, float]], key: str, label: str, color: str, style: str) -> None:
    """Plot a value of the epoch records, where they have it, with about fifteen markers at most."""
    points = [(record["epoch"], record[key]) for record in history if key in record]
    if points:
        every = max(1, len(points) // 15)
        axes.plot(
            *zip(*points, strict=True), style, color=color, label=label, markersize=4, markevery=every, linewidth=1.5
        )


def reliability_figure(calibrations: Mapping[str, Calibration]) -> Figure:
    """Draw reliability diagrams: the accuracy for each bin of confidence (DeGroot and Fienberg 1983).

    Args:
        calibrations: By title, in the order of the columns.
    """
    figure = Figure(figsize=(4.6 * len(calibrations), 5.2), dpi=150, layout="constrained")
    columns = figure.subplots(2, len(calibrations), squeeze=False, sharex=True, height_ratios=[3, 1]).T
    for (title, calibration), (upper, lower) in zip(calibrations.items(), columns, strict=True):
        bins = calibration.bins
        width = bins["upper"] - bins["lower"]
        upper.bar(
            bins["lower"],
            bins["accuracy"].fillna(0),
            width,
            align="edge",
            color=COLORS["train"],
            edgecolor="white",
            label="accuracy",
        )
        upper.plot([0, 1], [0, 1], "--", color="0.4", linewidth=1, label="perfect calibration")
        upper.plot(
            bins["confidence"], bins["accuracy"], "o", color=COLORS["val"], markersize=4, label="mean confidence"
        )
        upper.set(ylim=(0, 1), ylabel="proportion of correct images")
        upper.set_title(f"{title}\ncalibration error {calibration.ece:.1%}, loss {calibration.loss:.3f}")
        lower.bar(bins["lower"], bins["images"], width, align="edge", color="0.6", edgecolor="white")
        lower.set(xlim=(0, 1), xlabel="confidence: probability of the predicted class", ylabel="images")
        lower.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
        for axes in (upper, lower):
            axes.xaxis.set_major_formatter(PercentFormatter(1))
            axes.spines[["top", "right"]].set_visible(False)
        upper.yaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(*upper.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def corruption_figure(table: pd.DataFrame, clean: float) -> Figure:
    """Draw the accuracy over the severity of corruption, a line for each kind.

    Args:
        table: As returned by `corruption_table`.
        clean: Accuracy on the uncorrupted images, shown at severity 0.
    """
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    severities = [int(column) for column in table.columns if column != "mean"]
    styles = ["o-", "s-", "^-", "D-", "o--", "s--", "^--", "D--"]
    for number, (kind, row) in enumerate(table.iterrows()):
        accuracies = [clean, *row[severities]]
        axes.plot(
            [0, *severities],
            accuracies,
            styles[number % len(styles)],
            color=colormaps["tab10"](number),
            markersize=4,
            label=kind,
        )
    axes.set(xlabel="severity", ylabel="proportion of correct images", ylim=(0, 1), xticks=[0, *severities])
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def batch_figure(images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Draw the first images of a training batch, as they enter the network.

    Args:
        images: uint8 (B, R, R, 3).
        labels: float32 (B, K), each row adding up to 1; mixed where MixUp or CutMix is on.
        class_names: K names.
    """
    shown = min(len(images), MAX_BATCH_IMAGES)
    columns = min(4, shown)
    figure = Figure(figsize=(2.6 * columns, 2.9 * -(-shown // columns)), dpi=110, layout="constrained")
    for number in range(shown):
        axes = figure.add_subplot(-(-shown // columns), columns, number + 1)
        axes.imshow(images[number], interpolation="nearest")
        axes.axis("off")
        mixed = [(labels[number, i], class_names[i]) for i in np.flatnonzero(labels[number]).tolist()]
        title = mixed[0][1] if len(mixed) == 1 else "\n".join(f"{share:.0%} {name}" for share, name in mixed)
        axes.set_title(title, fontsize=8, parse_math=False)
    return figure

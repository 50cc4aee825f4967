"""The figures of a report, drawn with matplotlib."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, ScalarFormatter

from pipeline.evaluation.calibration import Calibration
from pipeline.evaluation.metrics import Evaluation
from pipeline.evaluation.robustness import SEVERITIES

ALL_CLASSES = 20  # up to so many the screen shows every class and the confusion matrix every count
FED_PICTURES = 16  # of a batch that are shown
NAMED_CLASSES = 60  # up to so many fit as names along the confusion matrix
COLOURS = {
    "train": "#0072B2",
    "val": "#D55E00",
    "top5": "#009E73",
    "rate": "#555555",
}  # Okabe and Ito 2008, distinct to the colour-blind


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
        colours = ScalarMappable(
            norm, ListedColormap(colormaps["viridis_r"](np.linspace(0.3, 1, 256)))
        )  # its yellow is lost on white
        size = max(2.5, (0.72 * 72 * side / n) ** 2)
        axes.scatter(predicted, true, c=colours.to_rgba(shares[true, predicted]), s=size, marker="s", linewidths=0)
        axes.set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -0.5), aspect="equal")
    if n <= ALL_CLASSES:
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
    unit = "" if n <= NAMED_CLASSES else " (number of the class)"
    axes.set(xlabel=f"predicted class{unit}", ylabel=f"true class{unit}")
    axes.set_title(f"{evaluation.split}: {evaluation.num_images:,} images, {evaluation.top1:.1%} right")
    ticks = [0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1]
    bar = figure.colorbar(
        colours, ax=axes, fraction=0.046, pad=0.02, ticks=ticks, format=PercentFormatter(1, decimals=0)
    )
    bar.set_label("share of the true class")
    return figure


def training_figure(history: Sequence[Mapping[str, float]]) -> Figure:
    """Loss, accuracy and learning rate over the epochs.

    Args:
        history: A record per epoch, as the training loop keeps them: epoch, train/loss, train/accuracy, learning_rate, and val/loss,
            val/accuracy, val/top5_accuracy where there is a validation split.
    """
    figure = Figure(figsize=(12, 3.8), dpi=150, layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    curve(loss, history, "train/loss", "training", COLOURS["train"], "o-")
    curve(loss, history, "val/loss", "validation", COLOURS["val"], "s--")
    loss.set(ylabel="loss (nats)", title="Loss")
    curve(accuracy, history, "train/accuracy", "training", COLOURS["train"], "o-")
    curve(accuracy, history, "val/accuracy", "validation", COLOURS["val"], "s--")
    curve(accuracy, history, "val/top5_accuracy", "validation, top 5", COLOURS["top5"], "^:")
    accuracy.set(ylabel="share of images right", title="Accuracy")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    curve(rate, history, "learning_rate", "", COLOURS["rate"], "o-")
    rate.set(ylabel="learning rate at the end of the epoch", title="Learning rate")
    rate.set_ylim(0, 1.05 * rate.get_ylim()[1])
    rate.yaxis.set_major_formatter(ScalarFormatter(useMathText=True))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    for axes in (loss, accuracy, rate):
        over_epochs(axes)
        if axes is not rate:
            axes.legend(frameon=False)
    return figure


def over_epochs(axes: Axes) -> None:
    """Dresses axes for curves over the epochs."""
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def curve(axes: Axes, history: Sequence[Mapping[str, float]], key: str, label: str, colour: str, style: str) -> None:
    """Draws a figure of the epochs' records, where they have it, with some fifteen markers at most."""
    points = [(record["epoch"], record[key]) for record in history if key in record]
    if points:
        every = max(1, len(points) // 15)
        axes.plot(
            *zip(*points, strict=True), style, color=colour, label=label, markersize=4, markevery=every, linewidth=1.5
        )


def reliability_figure(calibrations: Mapping[str, Calibration]) -> Figure:
    """Reliability diagrams: how often the network was right where it was so sure (DeGroot and Fienberg 1983).

    Args:
        calibrations: By title, one after the other.
    """
    figure = Figure(figsize=(4.6 * len(calibrations), 5.2), dpi=150, layout="constrained")
    columns = figure.subplots(2, len(calibrations), squeeze=False, sharex=True, height_ratios=[3, 1]).T
    for (title, found), (upper, lower) in zip(calibrations.items(), columns, strict=True):
        bins, width = found.bins, found.bins["upper"] - found.bins["lower"]
        upper.bar(
            bins["lower"],
            bins["accuracy"].fillna(0),
            width,
            align="edge",
            color=COLOURS["train"],
            edgecolor="white",
            label="right",
        )
        upper.plot([0, 1], [0, 1], "--", color="0.4", linewidth=1, label="as sure as right")
        upper.plot(
            bins["confidence"], bins["accuracy"], "o", color=COLOURS["val"], markersize=4, label="mean confidence"
        )
        upper.set(ylim=(0, 1), ylabel="share of the images right")
        upper.set_title(f"{title}\ncalibration error {found.ece:.1%}, loss {found.loss:.3f}")
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
    """Accuracy over the severity of corruption, a line for each kind.

    Args:
        table: As of `corruption_table`.
        clean: Accuracy on the pictures as they are, at severity 0.
    """
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    styles = ["o-", "s-", "^-", "D-", "o--", "s--", "^--", "D--"]
    for number, (kind, row) in enumerate(table.iterrows()):
        accuracies = [clean, *row[list(SEVERITIES)]]
        axes.plot(
            [0, *SEVERITIES],
            accuracies,
            styles[number % len(styles)],
            color=colormaps["tab10"](number),
            markersize=4,
            label=kind,
        )
    axes.set(xlabel="severity", ylabel="share of the images right", ylim=(0, 1), xticks=[0, *SEVERITIES])
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def batch_figure(images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> Figure:
    """The first pictures of a batch as they are fed to the network.

    Args:
        images: uint8 (B, R, R, 3).
        labels: float32 (B, K), adding up to 1; mixed where MixUp or CutMix is on.
        class_names: K names.
    """
    shown = min(len(images), FED_PICTURES)
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

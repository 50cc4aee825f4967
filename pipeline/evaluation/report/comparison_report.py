"""The comparison of runs as one self-contained HTML file, for small and large screens."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from pipeline.config.data import Background
from pipeline.data.preprocessing import decode
from pipeline.data.sources.base import DataSource
from pipeline.data.transcoding import transcode
from pipeline.errors import DataError
from pipeline.evaluation.compare import DIRECTIONS, RunComparison, RunPredictions, format_percent, format_points
from pipeline.evaluation.metrics import METRICS
from pipeline.evaluation.report.figures import curve, format_epoch_axis
from pipeline.evaluation.report.html_report import template_environment
from pipeline.evaluation.report.images import data_uri, jpeg
from pipeline.files import sha256_of

MAX_THUMBNAILS = 24  # for each pair and direction; the tables hold all images
THUMBNAIL_SIZE, THUMBNAIL_QUALITY = 208, 80  # pixels of the longer side; of the JPEG
# Okabe and Ito 2008, repeated beyond seven
RUN_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
History = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class ConfigDiff:
    """A difference between the settings of runs.

    Attributes:
        name: A key of the config, or the name of another property, such as a library.
        values: The value of each run, as text.
    """

    name: str
    values: tuple[str, ...]


def render_comparison(
    runs: Sequence[RunPredictions],
    pairs: Sequence[RunComparison],
    *,
    settings: Sequence[ConfigDiff],
    histories: Mapping[str, History],
    source: DataSource | None,
    background: Background = "white",
) -> str:
    """Render the comparison as HTML.

    Args:
        runs: All runs, the baseline first.
        pairs: The comparison of each further run with the baseline.
        settings: The settings in which the runs differ.
        histories: By run name, the epoch records, as for `figures.training_figure`; of the runs that have any.
        source: Source of the images, for thumbnails; None where they are not available.
        background: Color behind transparent pixels of the thumbnails.

    Returns:
        A self-contained HTML document.
    """
    templates = template_environment()
    templates.filters |= {"percent": format_percent, "signed": format_points}
    return templates.get_template("compare.html").render(
        runs=runs,
        pairs=pairs,
        shares=[pairs[0].accuracies[0], *(pair.accuracies[1] for pair in pairs)],
        settings=settings,
        figures=[(alt, _figure_uri(figure)) for alt, figure in training_curves(histories)],
        class_metrics=[_class_metric_rows(pair) for pair in pairs],
        changes=[_changes(pair, runs[0], source, background) for pair in pairs],
        tones={"better": "good", "worse": "bad", "open": ""},
    )


def _class_metric_rows(pair: RunComparison) -> list[tuple[str, ...]]:
    """Return title, value of A, value of B, difference and interval of each metric, formatted."""
    rows = []
    for name, metric in pair.class_metrics.items():
        spec = METRICS[name]
        value, low, high = (spec.format.replace("{:", "{:+").format(each) for each in metric.difference)
        values = (spec.format.format(each) for each in (metric.a, metric.b))
        rows.append((spec.title, *values, value, f"{low} to {high}"))
    return rows


def _changes(
    pair: RunComparison, first: RunPredictions, source: DataSource | None, background: Background
) -> list[dict[str, Any]]:
    """Return for each direction its name, its rows, and thumbnails of the first rows."""
    stored = first.images.table.set_index("key")
    changes = []
    for direction in DIRECTIONS:
        rows = pair.changed_images[pair.changed_images["turned"] == direction].to_dict("records")
        thumbnails = (
            [(row, _thumbnail(source, stored.loc[row["key"]], background)) for row in rows[:MAX_THUMBNAILS]]
            if source is not None
            else []
        )
        shown = [(row, uri) for row, uri in thumbnails if uri is not None]
        changes.append({"name": direction, "rows": rows, "thumbnails": shown})
    return changes


def _thumbnail(source: DataSource, stored: Any, background: Background) -> str | None:
    """Return a small JPEG of the image as a data URI; None where the file is missing, damaged or changed."""
    try:
        encoded = source.read(str(stored.name))
    except (DataError, OSError, LookupError, ValueError):
        return None
    if sha256_of(encoded) != stored["sha256"]:
        return None
    if stored.get("transcoded", False):
        encoded = transcode(encoded, background)
    with tf.device("CPU:0"):
        image = decode(tf.constant(encoded), tf.constant(int(stored["orientation"]))).numpy()
    return data_uri(jpeg(image, THUMBNAIL_SIZE, THUMBNAIL_QUALITY), "jpeg")


def training_curves(histories: Mapping[str, History]) -> list[tuple[str, Figure]]:
    """Draw loss and accuracy of all runs over their epochs.

    Args:
        histories: By run name, the epoch records.

    Returns:
        Alternative text and figure, for loss and for accuracy; an empty list where there are no records.
    """
    if not histories:
        return []
    figures = []
    for name, unit in (("loss", "loss (nats)"), ("accuracy", "proportion of correct images")):
        figure = Figure(figsize=(5.2, 3.6), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        for number, (run, history) in enumerate(histories.items()):
            color = RUN_COLORS[number % len(RUN_COLORS)]
            curve(axes, history, f"train/{name}", f"{run}, training", color, ":")
            curve(axes, history, f"val/{name}", f"{run}, validation", color, "o-")
        axes.set(ylabel=unit, title=name.capitalize())
        if name == "accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        format_epoch_axis(axes)
        for text in axes.legend(frameon=False, fontsize=8).get_texts():
            text.set_parse_math(False)
        figures.append((f"{name.capitalize()} of {', '.join(histories)} over the epochs", figure))
    return figures


def _figure_uri(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return data_uri(file.getvalue(), "svg+xml")

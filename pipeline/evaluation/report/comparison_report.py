"""A comparison of runs as one HTML file: it needs no network, and is read on a phone as on a desk."""

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

from pipeline.data.preprocessing import decode
from pipeline.data.sources.base import DataSource
from pipeline.evaluation.compare import RunComparison, RunPredictions, percent, signed
from pipeline.evaluation.report.figures import curve, over_epochs
from pipeline.evaluation.report.html_report import environment

THUMBNAILS = 24  # for each pair and direction; the tables hold all images
THUMBNAIL = 208  # pixels of the longer side
RUN_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)  # Okabe and Ito 2008, repeated beyond seven
DIRECTIONS = ("right to wrong", "wrong to right")
History = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class ConfigDiff:
    """Something that is not the same for all runs.

    Attributes:
        name: A key of the config, or what else it is.
        values: Each run's, as text.
    """

    name: str
    values: tuple[str, ...]


def comparison_page(
    runs: Sequence[RunPredictions],
    pairs: Sequence[RunComparison],
    *,
    settings: Sequence[ConfigDiff],
    histories: Mapping[str, History],
    source: DataSource | None,
) -> str:
    """Makes the page.

    Args:
        runs: All that were compared, the one that the others are compared with first.
        pairs: What came of it.
        settings: In what the runs differ.
        histories: The epochs' records of the runs by name, as `figures.training_figure` takes them; of those that have any.
        source: Where the images are, for thumbnails; None where they are not at hand.

    Returns:
        HTML in which everything is contained.
    """
    pages = environment()
    pages.filters |= {"percent": percent, "signed": signed}
    return pages.get_template("compare.html").render(
        runs=runs,
        pairs=pairs,
        shares=[pairs[0].accuracies[0], *(pair.accuracies[1] for pair in pairs)],
        settings=settings,
        figures=[(alternative, _as_uri(figure)) for alternative, figure in curves(histories)],
        changes=[_changes(pair, runs[0], source) for pair in pairs],
        tones={"better": "good", "worse": "bad", "open": ""},
    )


def _changes(pair: RunComparison, first: RunPredictions, source: DataSource | None) -> list[dict[str, Any]]:
    """For each direction: its name, its rows, and of the first of them the pictures."""
    stored = first.images.table.set_index("key")
    found = []
    for direction in DIRECTIONS:
        rows = pair.changed[pair.changed["turned"] == direction].to_dict("records")
        pictures = (
            [(row, _thumbnail(source, stored.loc[row["key"]])) for row in rows[:THUMBNAILS]]
            if source is not None
            else []
        )
        found.append(
            {"name": direction, "rows": rows, "pictures": [(row, uri) for row, uri in pictures if uri is not None]}
        )
    return found


def _thumbnail(source: DataSource, stored: Any) -> str | None:
    """A small JPEG of the picture as a data URI; None where the file is gone or is another one than was measured."""
    try:
        encoded = source.read(str(stored.name))
    except (OSError, LookupError, ValueError):
        return None
    if hashlib.sha256(encoded).hexdigest() != stored["sha256"]:
        return None
    with tf.device("CPU:0"):
        picture = Image.fromarray(decode(tf.constant(encoded), tf.constant(int(stored["orientation"]))).numpy())
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return _uri("image/jpeg", file.getvalue())


def curves(histories: Mapping[str, History]) -> list[tuple[str, Figure]]:
    """Loss and accuracy of all runs over their epochs, a figure each with the words that stand for it; none where there are no records."""
    if not histories:
        return []
    figures = []
    for name, unit in (("loss", "loss (nats)"), ("accuracy", "share of images right")):
        figure = Figure(figsize=(5.2, 3.6), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        for number, (run, history) in enumerate(histories.items()):
            colour = RUN_COLOURS[number % len(RUN_COLOURS)]
            curve(axes, history, f"train/{name}", f"{run}, training", colour, ":")
            curve(axes, history, f"val/{name}", f"{run}, validation", colour, "o-")
        axes.set(ylabel=unit, title=name.capitalize())
        if name == "accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        over_epochs(axes)
        for text in axes.legend(frameon=False, fontsize=8).get_texts():
            text.set_parse_math(False)
        figures.append((f"{name.capitalize()} of {', '.join(histories)} over the epochs", figure))
    return figures


def _as_uri(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return _uri("image/svg+xml", file.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"

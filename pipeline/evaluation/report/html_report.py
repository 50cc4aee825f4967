"""The page of a report: one HTML file that needs nothing else, not even a network."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipeline.evaluation.report.gallery import GalleryItem
from pipeline.evaluation.report.tables import metric_rows, summary_sentences, whole
from pipeline.evaluation.results import Results

SUSPECTS = 50  # that the page lists; the file has all


def environment() -> Environment:
    """The package's templates; all that they are filled with is escaped."""
    return Environment(
        loader=PackageLoader("pipeline.evaluation.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def data_uri(content: bytes, kind: str) -> str:
    """A picture as an address that holds it; `kind` is png or jpeg."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def write_page(
    path: Path,
    title: str,
    results: Results,
    figures: Mapping[str, Path],
    galleries: Mapping[str, Sequence[GalleryItem]],
    config: str,
) -> None:
    """Writes it, whole or not at all.

    Args:
        path: The file; its folder is made if missing.
        title: What the page is of.
        results: Of one split.
        figures: PNG files by title; those that do not exist are left out.
        galleries: Pictures by title.
        config: The run's config as YAML.
    """
    per_class = results.evaluation.per_class.astype(object)
    page = (
        environment()
        .get_template("report.html")
        .render(
            title=title,
            evaluation=results.evaluation,
            figure_rows=metric_rows(results),
            remarks=summary_sentences(results),
            figures={name: figure.read_bytes() for name, figure in figures.items() if figure.exists()},
            galleries=galleries,
            classes=per_class.where(per_class.notna(), None).to_dict("records"),
            corruptions=results.corruptions,
            suspects=results.suspects.head(SUSPECTS).to_dict("records"),
            num_suspects=len(results.suspects),
            config=config,
            data_uri=data_uri,
        )
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as aside:
        aside.write_text(page, encoding="utf-8")

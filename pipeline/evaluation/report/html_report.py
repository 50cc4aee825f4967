"""The report as one self-contained HTML file, which works without a network connection."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipeline.evaluation.report.gallery import GalleryItem
from pipeline.evaluation.report.images import data_uri
from pipeline.evaluation.report.tables import metric_rows, summary_sentences
from pipeline.evaluation.results import EvaluationResults
from pipeline.files import atomic_write

MAX_LABEL_ERRORS = 50  # listed in the report; label_errors.csv has all


def template_environment() -> Environment:
    """Create the environment of the package's templates; inserted values are escaped."""
    return Environment(
        loader=PackageLoader("pipeline.evaluation.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write_report(
    path: Path,
    title: str,
    results: EvaluationResults,
    figures: Mapping[str, Path],
    galleries: Mapping[str, Sequence[GalleryItem]],
    config: str,
) -> None:
    """Write the report, completely or not at all.

    Args:
        path: The file; its folder is created if missing.
        title: Title of the page.
        results: Of one split.
        figures: PNG files by title; those that do not exist are left out.
        galleries: Items by title.
        config: Config of the run as YAML.
    """
    per_class = results.evaluation.per_class.astype(object)
    html = (
        template_environment()
        .get_template("report.html")
        .render(
            title=title,
            evaluation=results.evaluation,
            metric_rows=metric_rows(results),
            summary=summary_sentences(results),
            figures={name: figure.read_bytes() for name, figure in figures.items() if figure.exists()},
            galleries=galleries,
            classes=per_class.where(per_class.notna(), None).to_dict("records"),
            corruptions=results.corruptions,
            label_errors=results.label_errors.head(MAX_LABEL_ERRORS).to_dict("records"),
            num_label_errors=len(results.label_errors),
            config=config,
            data_uri=data_uri,
        )
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, html)

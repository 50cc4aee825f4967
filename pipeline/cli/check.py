"""Check a data set: the scan that precedes every training, on its own, with all of its findings."""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from pipeline.cli.arguments import add_config, add_overrides, check_folder, command_parser, local_path
from pipeline.config.loader import load_config
from pipeline.console import Console, plural
from pipeline.files import atomic_write

if TYPE_CHECKING:
    from pipeline.data.manifest import Manifest
    from pipeline.data.validation import ValidationReport

STYLES = {"error": "bold red", "warning": "yellow", "info": "dim"}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser(
        "check",
        "Decode every image of a data set as training does, and report the problems. The data are not changed.",
        epilog="Exit code: 0 if training could start, 2 if not.",
    )
    add_config(parser, "lite0_folder")
    parser.add_argument("--json", type=local_path, metavar="FILE", help="write all findings, with all files, as JSON")
    add_overrides(parser, "data.path=IMAGES")
    return parser.parse_intermixed_args(argv)


def main(console: Console, argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        console: Console for the output.
        argv: Arguments; None takes those of the process.
    """
    arguments = parse_arguments(argv)
    config = load_config(arguments.config, arguments.overrides)
    if arguments.json is not None:
        check_folder(arguments.json)
    console.redirect_library_output(None)

    import tensorflow as tf

    from pipeline.data.sources.base import LayoutError, LayoutProblem
    from pipeline.data.sources.catalog import open_source
    from pipeline.data.validation import validate

    tf.config.set_visible_devices([], "GPU")
    layout_problems: tuple[LayoutProblem, ...] = ()
    try:
        source = open_source(config.data)
    except LayoutError as error:
        source, layout_problems = error.source, error.problems
    start = time.monotonic()
    with console.progress("checking the data") as progress:
        report = validate(source, config.data, seed=config.seed, progress=progress, exhaustive=True)
    report = report.with_layout_problems(layout_problems)
    print_report(report, time.monotonic() - start, console)
    if arguments.json is not None:
        atomic_write(arguments.json, as_json(report))
        console.print(f"all findings  {arguments.json}", wrap=False)
    return 2 if report.errors else 0


def print_report(report: "ValidationReport", seconds: float, console: Console) -> None:
    """Print the classes, the findings with their first files, and the verdict."""
    if report.manifest is not None:
        console.print(class_table(report.manifest))
        num_images = len(report.manifest.table)
        console.print(
            f"\n{plural(num_images, 'usable image')}; checked in {seconds:,.1f} s, "
            f"{num_images / seconds:,.0f} a second\n"
        )
    for finding in report.findings:
        text = str(finding) if finding.severity == "error" else finding.sentence()
        console.print(
            Text.assemble((f"{finding.severity:<8} ", STYLES[finding.severity]), text.replace("\n", "\n" + " " * 9))
        )
    if report.errors:
        console.print(Text("\nnot usable: " + ", ".join(finding.text for finding in report.errors), STYLES["error"]))
    else:
        console.print(Text("\nusable", "bold green"))


def as_json(report: "ValidationReport") -> str:
    """Return the whole report as JSON, with every file of every finding."""
    manifest = report.manifest
    return json.dumps(
        {
            "usable": not report.errors,
            "num_images": len(manifest.table) if manifest is not None else None,
            "classes": manifest.class_counts().to_dict("index") if manifest is not None else None,
            "bad_files": [{"path": key, "problem": problem} for key, problem in report.skipped_images],
            "findings": [asdict(finding) for finding in report.findings],
        },
        indent=1,
        ensure_ascii=False,
    )


def class_table(manifest: "Manifest") -> Table:
    """Return a console table of the images per class and split."""
    counts = manifest.class_counts()
    table = Table(box=None)
    for column in ("class", *counts.columns):
        table.add_column(column, justify="left" if column == "class" else "right", header_style="dim")
    rows = counts if len(counts) <= 30 else counts.head(10)
    for name, row in rows.iterrows():
        table.add_row(str(name), *(f"{count:,}" for count in row))
    if len(rows) < len(counts):
        table.add_row(f"and {plural(len(counts) - len(rows), 'more class', 'more classes')}")
    table.add_row("all", *(f"{count:,}" for count in counts.sum()), style="bold")
    return table

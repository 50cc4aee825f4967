"""python -m pipeline check: the scan that precedes every training, alone, with everything that it found."""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from pipeline.config.loader import load_config
from pipeline.console import Console
from pipeline.errors import UserError
from pipeline.runs import run_directory

if TYPE_CHECKING:
    from pipeline.data.validation import ValidationReport

STYLES = {"error": "bold red", "warning": "yellow", "fact": "dim"}


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """The command line behind the program's name."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline check",
        description="Decode every picture of a data set as training would, and say what is wrong with it. Nothing of it is changed.",
        epilog="Exit code: 0 if training could start, 2 if not.",
    )
    parser.add_argument("--config", type=Path, required=True, help="a YAML file, such as configs/lite0_folder.yaml")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all findings, with all files, as JSON")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the config, such as data.path=PHOTOS"
    )
    return parser.parse_intermixed_args(words)


def main(words: Sequence[str], screen: Console) -> int:
    """Runs the program; returns its exit code."""
    arguments = parse_arguments(words)
    config = load_config(arguments.config, arguments.overrides)
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise UserError(f"{arguments.json}: there is no folder {arguments.json.parent}; make it first")
    screen.redirect_library_output(None)

    import tensorflow as tf

    from pipeline.data.sources.catalog import open_source
    from pipeline.data.validation import validate

    tf.config.set_visible_devices([], "GPU")
    source = open_source(config.data)
    start = time.monotonic()
    with screen.progress("checking the data") as count:
        examination = validate(source, config.data, seed=config.seed, progress=count)
    print_report(examination, time.monotonic() - start, screen)
    if arguments.json is not None:
        run_directory.write(arguments.json, as_json(examination))
        screen.print(f"all findings  {arguments.json}")
    return 2 if examination.errors else 0


def print_report(examination: "ValidationReport", seconds: float, screen: Console) -> None:
    """Prints the classes, the findings with their first files, and the verdict."""
    from pipeline.data.validation import class_table

    if examination.manifest is not None:
        screen.print(class_table(examination.manifest))
        pictures = len(examination.manifest.table)
        screen.print(
            f"\n{pictures:,} usable pictures; checked in {seconds:,.1f} s, {pictures / seconds:,.0f} a second\n"
        )
    for finding in examination.findings:
        text = str(finding) if finding.severity == "error" else finding.sentence()
        screen.print(
            Text.assemble((f"{finding.severity:<8} ", STYLES[finding.severity]), text.replace("\n", "\n" + " " * 9))
        )
    if examination.errors:
        screen.print(
            Text("\nnot usable: " + ", ".join(finding.text for finding in examination.errors), STYLES["error"])
        )
    else:
        screen.print(Text("\nusable", "bold green"))


def as_json(examination: "ValidationReport") -> str:
    """Everything that was found."""
    manifest = examination.manifest
    return json.dumps(
        {
            "usable": not examination.errors,
            "pictures": len(manifest.table) if manifest is not None else None,
            "classes": manifest.class_counts().to_dict("index") if manifest is not None else None,
            "bad_files": [{"path": key, "problem": problem} for key, problem in examination.left_out],
            "findings": [asdict(finding) for finding in examination.findings],
        },
        indent=1,
        ensure_ascii=False,
    )

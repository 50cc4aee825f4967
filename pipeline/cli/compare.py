"""python -m pipeline compare: whether one run is better than another on the same images, and how sure that is."""

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from pipeline.console import Console, python_executable
from pipeline.errors import RunError, UserError
from pipeline.runs import run_directory
from pipeline.runs.run_directory import RunDirectory

if TYPE_CHECKING:
    from pipeline.data.sources.base import DataSource
    from pipeline.evaluation.compare import RunComparison, RunPredictions
    from pipeline.evaluation.report.comparison_report import ConfigDiff, History

SHOWN = 5  # images on the screen for each pair and direction; the page has all
STYLES = {"better": "bold green", "worse": "bold red", "open": "bold yellow"}


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """The command line behind the program's name."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline compare",
        description="Compare runs that were measured on the same images: each with the first, by McNemar's test and a paired bootstrap.",
        epilog="A page with everything, and its figures as JSON, go into the last run's report/compare/, and to that run in MLflow.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run's directory, its MLflow id, or latest; at least two"
    )
    parser.add_argument(
        "--split", choices=["train", "val", "test"], help="the images to compare on (default: test, else val)"
    )
    arguments = parser.parse_args(words)
    if len(arguments.runs) < 2:
        parser.error("name at least two runs: the one to compare with, and one or more that are compared with it")
    return arguments


def main(words: Sequence[str], screen: Console) -> int:
    """Runs the program; returns its exit code."""
    arguments = parse_arguments(words)
    named = find(arguments.runs)
    split = measured_split(named, arguments.split)
    last = list(named.values())[-1]
    screen.redirect_library_output(last.log)

    from pipeline.evaluation.compare import compare, read_measured
    from pipeline.evaluation.report.comparison_report import comparison_page
    from pipeline.tracking.mlflow_logger import log_comparison

    runs = [read_measured(name, split, run.predictions(split), run.manifest) for name, run in named.items()]
    pairs = compare(runs)
    settings = different_settings(named)
    print_comparison(pairs, settings, runs, screen)

    source = open_pictures(named, screen) if any(len(pair.changed) for pair in pairs) else None
    page = comparison_page(runs, pairs, settings=settings, histories=histories(named), source=source)
    directory = last.comparison([run.path.resolve().name for run in list(named.values())[:-1]])
    directory.mkdir(parents=True, exist_ok=True)
    run_directory.write(directory / f"{split}.html", page)
    run_directory.write(directory / f"{split}.json", as_json(pairs, settings))
    screen.print(f"\nthe page  {directory / f'{split}.html'}")
    if (tracked := last.mlflow_run()) is None:
        screen.print(f"{last.path} is not tracked in MLflow: nothing is logged there")
    else:
        log_comparison(last.load_config(), tracked, {f"compare/{runs[0].name}": pairs[-1].sentence}, directory)
        screen.print(f"logged to the run {tracked[1]} in MLflow")
    return 0


def find(words: Sequence[str]) -> dict[str, RunDirectory]:
    """The runs, each by the name of its directory; by its whole path where two are called the same."""
    runs = [run_directory.find(word) for word in words]
    paths = [run.path.resolve() for run in runs]
    for word, path in zip(words, paths, strict=True):
        if paths.count(path) > 1:
            raise UserError(f"{word}: is named twice; a run is compared with others")
    names = [path.name for path in paths]
    return {
        name if names.count(name) == 1 else str(path): run for name, path, run in zip(names, paths, runs, strict=True)
    }


def measured_split(named: Mapping[str, RunDirectory], wanted: str | None) -> str:
    """The split that all runs were measured on.

    Raises:
        RunError: One was not; with the commands that do it.
    """
    measured = [split for split in ("test", "val") if any(run.predictions(split).exists() for run in named.values())]
    split = wanted or next(iter(measured), "test")
    missing = [run for run in named.values() if not run.predictions(split).exists()]
    if missing:
        option = f" --split {split}" if wanted or measured else ""
        commands = "\n".join(f"  {python_executable()} evaluate.py --run {run.path}{option}" for run in missing)
        paths = ", ".join(str(run.path) for run in missing)
        other = f", or compare by --split {measured[0]}" if measured and split not in measured else ""
        raise RunError(f"{paths}: not measured on the split {split} yet{other}. Measure by\n{commands}")
    return split


def different_settings(named: Mapping[str, RunDirectory]) -> list["ConfigDiff"]:
    """In what the runs' configs, data and libraries differ."""
    from pipeline.data.manifest import Manifest
    from pipeline.evaluation.report.comparison_report import ConfigDiff
    from pipeline.runs.provenance import flatten

    told = []
    for run in named.values():
        versions = {f"version.{name}": version for name, version in newest_record(run).get("versions", {}).items()}
        digest = {"data (digest of all pictures, labels and splits)": Manifest.load(run.manifest).digest()[:12]}
        told.append(dict(flatten(run.load_config().model_dump(mode="json"))) | digest | versions)
    keys = dict.fromkeys(key for values in told for key in values)
    settings = [ConfigDiff(key, tuple(values.get(key, "-") for values in told)) for key in keys]
    return [setting for setting in settings if len(set(setting.values)) > 1]


def histories(named: Mapping[str, RunDirectory]) -> dict[str, "History"]:
    """The epochs' records of the runs that still have a checkpoint."""
    records = {name: newest_record(run).get("history", []) for name, run in named.items()}
    return {name: history for name, history in records.items() if history}


def newest_record(run: RunDirectory) -> dict[str, Any]:
    """The manifest of the run's newest good checkpoint; nothing where there is none."""
    from pipeline.training.checkpoint import latest_valid_checkpoint, read_manifest

    newest, _ = latest_valid_checkpoint(run.checkpoints)
    return {} if newest is None else read_manifest(newest)


def open_pictures(named: Mapping[str, RunDirectory], screen: Console) -> "DataSource | None":
    """The first run's data that are still at hand: the compared images are the same in all of them."""
    from pipeline.data.sources.catalog import open_source

    problem = ""
    for run in named.values():
        try:
            return open_source(run.load_config().data, fetch=False)
        except UserError as error:
            problem = str(error).partition("\n")[0]
    screen.print(f"the page shows no pictures: {problem}")
    return None


def print_comparison(
    pairs: Sequence["RunComparison"],
    settings: Sequence["ConfigDiff"],
    runs: Sequence["RunPredictions"],
    screen: Console,
) -> None:
    """Prints the verdicts, what was set otherwise, and the first of the images that changed sides."""
    for pair in pairs:
        screen.print(Text.assemble((pair.claim, STYLES[pair.verdict]), ": ", pair.evidence))
    screen.print(Text("All this is about these networks; the same config with another seed gives another.", "dim"))
    if settings:
        table = Table(box=None, pad_edge=False, title="\nset otherwise", title_justify="left")
        for column in ("key", *(run.name for run in runs)):
            table.add_column(column, header_style="dim", overflow="fold")
        for setting in settings:
            table.add_row(*(Text(text) for text in (setting.name, *setting.values)))
        screen.print(table)
    for pair in pairs:
        for turned, rows in groupby(pair.changed.to_dict("records"), key=lambda row: row["turned"]):
            images = list(rows)
            screen.print(f"\nfrom {turned}, {pair.a} to {pair.b}: {len(images):,}")
            for row in images[:SHOWN]:
                screen.print(
                    f"  {row['key']}  ({row['true_class']}): {row['predicted_a']} {row['probability_a']:.1%} -> "
                    f"{row['predicted_b']} {row['probability_b']:.1%}"
                )
            if len(images) > SHOWN:
                screen.print(f"  and {len(images) - SHOWN:,} more")


def as_json(pairs: Sequence["RunComparison"], settings: Sequence["ConfigDiff"]) -> str:
    """All that was found."""
    return json.dumps(
        {
            "pairs": [{**pair.figures(), "changed": pair.changed.to_dict("records")} for pair in pairs],
            "settings": {setting.name: setting.values for setting in settings},
        },
        indent=1,
        ensure_ascii=False,
    )

"""Compare runs on the same images, with significance tests."""

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from pipeline.cli.arguments import command_parser
from pipeline.console import Console, command_line
from pipeline.errors import RunError, UserError
from pipeline.files import atomic_write
from pipeline.runs import run_directory
from pipeline.runs.provenance import flatten
from pipeline.runs.run_directory import RunDirectory

if TYPE_CHECKING:
    from pipeline.data.sources.base import DataSource
    from pipeline.evaluation.compare import RunComparison, RunPredictions
    from pipeline.evaluation.report.comparison_report import ConfigDiff, History

MAX_PRINTED = 5  # images in the terminal for each pair and direction; the report has all
STYLES = {"better": "bold green", "worse": "bold red", "open": "bold yellow"}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser(
        "compare",
        "Compare runs that were evaluated on the same images, each with the first, by McNemar's test and a paired "
        "bootstrap.",
        epilog="The report, as HTML and as JSON, goes into the last run's report/compare/ and to that run in MLflow.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run's directory, its MLflow run id, or latest; at least two"
    )
    parser.add_argument(
        "--split", choices=["train", "val", "test"], help="the images to compare on (default: test, else val)"
    )
    arguments = parser.parse_args(argv)
    if len(arguments.runs) < 2:
        parser.error("name at least two runs: the baseline first, then one or more that are compared with it")
    return arguments


def main(console: Console, argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        console: Console for the output.
        argv: Arguments; None takes those of the process.
    """
    arguments = parse_arguments(argv)
    named = find_runs(arguments.runs)
    split = evaluated_split(named, arguments.split)
    last = list(named.values())[-1]
    console.redirect_library_output(last.log)

    from pipeline.evaluation.compare import compare, read_run_predictions
    from pipeline.evaluation.report.comparison_report import render_comparison
    from pipeline.tracking.mlflow_logger import log_comparison

    with console.waiting("comparing the runs"):
        runs = [read_run_predictions(name, split, run.predictions(split), run.manifest) for name, run in named.items()]
        pairs = compare(runs)
        settings = config_differences(named)
    print_comparison(pairs, settings, runs, console)

    source = open_images(named, console) if any(len(pair.changed_images) for pair in pairs) else None
    with console.waiting("writing the report"):
        report = render_comparison(
            runs,
            pairs,
            settings=settings,
            histories=histories(named),
            source=source,
            background=last.load_config().data.background,
        )
    directory = last.comparison([run.path.resolve().name for run in list(named.values())[:-1]])
    directory.mkdir(parents=True, exist_ok=True)
    atomic_write(directory / f"{split}.html", report)
    atomic_write(directory / f"{split}.json", as_json(pairs, settings))
    console.print(f"\nreport    {directory / f'{split}.html'}", wrap=False)
    if (mlflow_run := last.mlflow_run()) is None:
        console.print(f"{last.path} is not tracked in MLflow: nothing is logged there")
    else:
        logged = log_comparison(
            last.load_config().tracking.uri, mlflow_run, {f"compare/{runs[0].name}": pairs[-1].sentence}, directory
        )
        console.print(f"{'logged to' if logged else 'not logged: MLflow no longer has'} the run {mlflow_run[1]}")
    return 0


def find_runs(names: Sequence[str]) -> dict[str, RunDirectory]:
    """Find the runs.

    Args:
        names: A directory, an MLflow run id or latest for each.

    Returns:
        The runs by the names of their directories; by their paths where two have the same name.

    Raises:
        RunError: There is no such run.
        UserError: A run is named twice.
    """
    runs = [run_directory.find(name) for name in names]
    paths = [run.path.resolve() for run in runs]
    for name, path in zip(names, paths, strict=True):
        if paths.count(path) > 1:
            raise UserError(f"{name}: is named twice; a run is compared with others")
    dir_names = [path.name for path in paths]
    return {
        name if dir_names.count(name) == 1 else str(path): run
        for name, path, run in zip(dir_names, paths, runs, strict=True)
    }


def evaluated_split(runs: Mapping[str, RunDirectory], split: str | None) -> str:
    """Return the split to compare on.

    Args:
        runs: The runs by name.
        split: The split to use; None for test or else val, whichever a run was evaluated on.

    Raises:
        RunError: A run was not evaluated on the split. The message holds the commands that do it.
    """
    evaluated = [name for name in ("test", "val") if any(run.predictions(name).exists() for run in runs.values())]
    option = ("--split", split or evaluated[0]) if split or evaluated else ()
    split = split or next(iter(evaluated), "test")
    missing = [run for run in runs.values() if not run.predictions(split).exists()]
    if missing:
        commands = "\n".join(f"  {command_line('evaluate', '--run', run.path, *option)}" for run in missing)
        paths = ", ".join(str(run.path) for run in missing)
        other = f", or compare by --split {evaluated[0]}" if evaluated and split not in evaluated else ""
        raise RunError(f"{paths}: not evaluated on the split {split} yet{other}. Evaluate by\n{commands}")
    return split


def config_differences(named: Mapping[str, RunDirectory]) -> list["ConfigDiff"]:
    """Find the config keys, data and library versions in which the runs differ."""
    from pipeline.data.manifest import Manifest
    from pipeline.evaluation.report.comparison_report import ConfigDiff

    values_by_run = []
    for run in named.values():
        versions = {
            f"version.{name}": version for name, version in latest_checkpoint_metadata(run).get("versions", {}).items()
        }
        digest = {"data (digest of all images, labels and splits)": Manifest.load(run.manifest).digest()[:12]}
        values_by_run.append(dict(flatten(run.load_config().model_dump(mode="json"))) | digest | versions)
    keys = dict.fromkeys(key for values in values_by_run for key in values)
    settings = [ConfigDiff(key, tuple(values.get(key, "-") for values in values_by_run)) for key in keys]
    return [setting for setting in settings if len(set(setting.values)) > 1]


def histories(named: Mapping[str, RunDirectory]) -> dict[str, "History"]:
    """Return the history of each run that has a checkpoint: a record per epoch."""
    records = {name: latest_checkpoint_metadata(run).get("history", []) for name, run in named.items()}
    return {name: history for name, history in records.items() if history}


def latest_checkpoint_metadata(run: RunDirectory) -> dict[str, Any]:
    """Return the metadata of the run's newest valid checkpoint; an empty one if there is none."""
    from pipeline.training.checkpoint import latest_valid_checkpoint, read_metadata

    newest, _ = latest_valid_checkpoint(run.checkpoints)
    return {} if newest is None else read_metadata(newest)


def open_images(named: Mapping[str, RunDirectory], console: Console) -> "DataSource | None":
    """Open the data of the first run whose data are available: the compared images are the same in all runs."""
    from pipeline.data.sources.catalog import open_source

    problem = ""
    for run in named.values():
        try:
            return open_source(run.load_config().data, download=False)
        except UserError as error:
            problem = str(error).partition("\n")[0]
    console.print(f"the report shows no images: {problem}")
    return None


def print_comparison(
    pairs: Sequence["RunComparison"],
    settings: Sequence["ConfigDiff"],
    runs: Sequence["RunPredictions"],
    console: Console,
) -> None:
    """Print the verdicts, the differing settings, and the first of the images with a changed result."""
    for pair in pairs:
        console.print(Text.assemble((pair.claim, STYLES[pair.verdict]), ": ", pair.evidence))
    console.print(Text("These results hold for these models; training with another seed gives another model.", "dim"))
    if settings:
        table = Table(box=None, pad_edge=False, title="\ndifferent settings", title_justify="left")
        for column in ("key", *(run.name for run in runs)):
            table.add_column(column, header_style="dim", overflow="fold")
        for setting in settings:
            table.add_row(*(Text(text) for text in (setting.name, *setting.values)))
        console.print(table)
    for pair in pairs:
        for turned, rows in groupby(pair.changed_images.to_dict("records"), key=lambda row: row["turned"]):
            images = list(rows)
            console.print(f"\nfrom {turned}, {pair.a} to {pair.b}: {len(images):,}")
            for row in images[:MAX_PRINTED]:
                console.print(
                    f"  {row['key']}  ({row['true_class']}): {row['predicted_a']} {row['probability_a']:.1%} -> "
                    f"{row['predicted_b']} {row['probability_b']:.1%}"
                )
            if len(images) > MAX_PRINTED:
                console.print(f"  and {len(images) - MAX_PRINTED:,} more")


def as_json(pairs: Sequence["RunComparison"], settings: Sequence["ConfigDiff"]) -> str:
    """Return the comparisons and the differing settings as JSON."""
    return json.dumps(
        {
            "pairs": [{**pair.to_json(), "changed": pair.changed_images.to_dict("records")} for pair in pairs],
            "settings": {setting.name: setting.values for setting in settings},
        },
        indent=1,
        ensure_ascii=False,
    )

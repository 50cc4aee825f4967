"""Export the model of a run for other runtimes. Each file is verified against the model."""

import argparse
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.table import Table
from rich.text import Text

from pipeline.cli.arguments import add_overrides, command_parser, local_path
from pipeline.cli.loaded_model import choose_split, find_finished_run
from pipeline.config.loader import load_config
from pipeline.config.schema import Config
from pipeline.console import Console, install_command, plural
from pipeline.errors import UserError, suggest
from pipeline.export.directory import FAILED, FORMATS, ExportDirectory, prepare
from pipeline.files import sha256_of
from pipeline.runs.run_directory import RunDirectory

if TYPE_CHECKING:
    from pipeline.export.loading import LoadedExport
    from pipeline.export.verification import ParityReport, ReferenceResult

MAX_BATCH_SIZE = 32  # images


class ExportResult(NamedTuple):
    """The result of one format.

    Attributes:
        size: Bytes; None if the format could not be written.
        parity: Comparison with the model; None if the format could not be written or run.
        failures: Reasons why the export does not agree with the model; empty if it does.
    """

    size: int | None
    parity: "ParityReport | None"
    failures: tuple[str, ...]


def parse_formats(text: str) -> tuple[str, ...]:
    """Parse a comma-separated list of formats, without duplicates."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in FORMATS:
            raise argparse.ArgumentTypeError(f"there is no format {name!r}{suggest(name, FORMATS)}")
    return names


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser(
        "export",
        "Write a run's model for other runtimes, load each file in its own runtime, and compare both on every image of "
        "a split.",
        epilog="Exit code: 0 if every file agrees with the model, 1 if one does not; that one is moved to failed/.",
    )
    parser.add_argument(
        "--run", type=os.path.expanduser, required=True, help="a run's directory, its MLflow run id, or latest"
    )
    parser.add_argument(
        "--formats", type=parse_formats, default=tuple(FORMATS), help=f"some of {','.join(FORMATS)} (default: all)"
    )
    parser.add_argument(
        "--out", type=local_path, metavar="DIR", help="folder of the files (default: export/ in the run's directory)"
    )
    parser.add_argument("--split", choices=["train", "val", "test"], help="the split to compare on (default: test)")
    add_overrides(parser, "export.min_agreement=0.98", metavar="export.key=value")
    arguments = parser.parse_intermixed_args(argv)
    for override in arguments.overrides:
        if not override.startswith("export."):
            parser.error(f"{override}: only keys of export can be changed here, as in export.min_agreement=0.98")
    return arguments


def main(console: Console, argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        console: Console for the output.
        argv: Arguments; None takes those of the process.
    """
    arguments = parse_arguments(argv)
    run = find_finished_run(arguments.run)
    config = load_config(run.config, arguments.overrides)
    check_packages(arguments.formats)
    with run.exclusive_lock():
        digest = sha256_of(run.model)
        directory = prepare(arguments.out or run.export, arguments.formats, digest)
        console.redirect_library_output(run.log)
        return export(run, config, directory, arguments.formats, arguments.split, digest, console)


def check_packages(names: Sequence[str]) -> None:
    """Check that the packages that write and load the formats are installed.

    Raises:
        UserError: Packages are missing. The message names all of them.
    """
    missing = {
        package: name
        for name in names
        for module, package in FORMATS[name].packages.items()
        if find_spec(module) is None
    }
    if missing:
        raise UserError(
            f"{', '.join(dict.fromkeys(missing.values()))} needs {', '.join(missing)}, which is not installed: "
            f"{install_command('export')}, or choose other --formats"
        )


def export(
    run: RunDirectory,
    config: Config,
    directory: ExportDirectory,
    names: Sequence[str],
    split: str | None,
    digest: str,
    console: Console,
) -> int:
    """Write and verify every format, then publish all of them at once.

    Args:
        run: Directory of the run.
        config: Config of the run, with the limits of the comparison.
        directory: Directory of the exported files.
        names: The formats.
        split: The split to compare on; None for test, or val if there is no test split.
        digest: SHA-256 of the model's file.
        console: Console for the results.

    Returns:
        The exit code: 1 if a format does not agree with the model.
    """
    import keras
    import tensorflow as tf

    from pipeline.data.input_pipeline import evaluation_stream
    from pipeline.data.manifest import Manifest
    from pipeline.data.sources.catalog import open_source
    from pipeline.export.formats import WRITERS, ModelSignature, calibration_rows
    from pipeline.export.loading import LOADERS, run_model
    from pipeline.export.verification import check_parity, run_reference
    from pipeline.tasks import TASKS

    # The other runtimes use the CPU. Latencies and last digits are comparable only on the same device.
    tf.config.set_visible_devices([], "GPU")
    manifest = Manifest.load(run.manifest)
    split = choose_split(run, manifest, split)
    source = open_source(config.data)
    signature = ModelSignature(
        manifest.class_names,
        config.variant.resolution,
        config.model.channels,
        config.data.resize,
        TASKS[config.task],
        config.data.background,
    )
    batch_size = min(MAX_BATCH_SIZE, config.train.micro_batch_size or MAX_BATCH_SIZE)
    images = evaluation_stream(manifest, source, config, manifest.indices(split), batch_size=batch_size)
    rows = calibration_rows(manifest, config.export.calibration_images, config.seed)
    calibration = evaluation_stream(manifest, source, config, rows, batch_size=1)
    with console.waiting("loading the model"):
        model = keras.saving.load_model(run.model, compile=False)
    console.print(
        f"{run.path}: EfficientNet-{config.variant.name} at {config.variant.resolution} px, "
        f"compared on all images of {split}"
    )
    with console.progress(f"model.keras: evaluating {split}") as progress:
        reference = run_reference(run_model(model), signature.class_names, images, split, signature.task, progress)
    results = {}
    with directory.staged() as staging:
        for name in names:
            spec = FORMATS[name]
            with console.progress(f"{name}: evaluating {split}") as progress:
                compare = partial(
                    check_parity,
                    reference=reference,
                    dataset=images,
                    limits=config.export,
                    exact=spec.exact,
                    progress=progress,
                )
                write = partial(WRITERS[name], model, signature, calibration)
                console.print(f"{name}: converting and comparing ...")
                results[name] = export_format(name, staging / spec.file, write, LOADERS[name], compare)
        directory.publish(
            {"model": {"run": str(run.path), "sha256": digest, "variant": config.variant.name}, **signature.describe()},
            {name: metadata_entry(name, result, reference, config) for name, result in results.items()},
            signature.class_names,
        )
    print_results(results, reference, run.model.stat().st_size, console)
    console.print(f"written to {directory.path}")
    return 1 if any(result.failures for result in results.values()) else 0


def export_format(
    name: str,
    path: Path,
    write: Callable[[Path], None],
    load: "Callable[[Path], LoadedExport]",
    compare: "Callable[[LoadedExport], ParityReport]",
) -> ExportResult:
    """Write a format, load it back and compare. Any exception of a converter or a runtime fails this format only."""
    try:
        write(path)
    except Exception as error:
        logging.getLogger("pipeline").exception("%s cannot be written", name)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return ExportResult(None, None, (f"cannot be written: {_short(error)}",))
    files = path.rglob("*") if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files if file.is_file())
    try:
        parity = compare(load(path))
    except Exception as error:
        logging.getLogger("pipeline").exception("%s cannot be run", name)
        return ExportResult(size, None, (f"cannot be loaded back and run: {_short(error)}",))
    return ExportResult(size, parity, parity.failures)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def metadata_entry(name: str, result: ExportResult, reference: "ReferenceResult", config: Config) -> dict[str, Any]:
    """Return the entry of a format in `metadata.json`."""
    from pipeline.distributed.devices import processor_name

    spec, folder = FORMATS[name], f"{FAILED}/" if result.failures else ""
    metadata: dict[str, Any] = {
        "file": None if result.size is None else folder + spec.file,
        "passed": not result.failures,
        "failures": list(result.failures),
        "bytes": result.size,
        "limits": config.export.model_dump(mode="json"),
        "versions": {package: version(package) for package in ("tensorflow", "keras", *spec.packages.values())},
    }
    if (parity := result.parity) is not None:
        figures = {
            "max_logit_difference": parity.max_logit_difference,
            "logit_std": reference.logit_std,
            "top1_agreement": parity.agreement,
            "accuracy": parity.accuracy,
            "model_accuracy": reference.accuracy,
            "latency_ms": parity.latency * 1e3,
            "model_latency_ms": reference.latency * 1e3,
        }
        metadata["parity"] = {
            "split": reference.split,
            "images": len(reference.predictions.index),
            "machine": processor_name(),
            **{key: value if math.isfinite(value) else None for key, value in figures.items()},
        }
    return metadata


def print_results(
    results: Mapping[str, ExportResult], reference: "ReferenceResult", model_size: int, console: Console
) -> None:
    """Print a row for the model and for each format, and the reasons of failures."""
    table = Table(box=None, pad_edge=False)
    for title in ("", "MB", "largest logit difference", "top-1 agreement", "accuracy", "ms per image", ""):
        table.add_column(title, justify="right" if title else "left", header_style="dim")
    table.add_row(
        "model.keras",
        f"{model_size / 1e6:.1f}",
        "",
        "",
        f"{reference.accuracy:.2%}",
        f"{reference.latency * 1e3:.1f}",
        "",
    )
    for name, (size, parity, failures) in results.items():
        figures = (
            ("-", "-", "-", "-")
            if parity is None
            else (
                f"{parity.max_logit_difference:.2g}",
                f"{parity.agreement:.2%}",
                f"{parity.accuracy:.2%}",
                f"{parity.latency * 1e3:.1f}",
            )
        )
        verdict = Text("failed", "bold red") if failures else Text("passed", "green")
        table.add_row(name, "-" if size is None else f"{size / 1e6:.1f}", *figures, verdict)
    console.print(table)
    console.print(
        f"over {plural(len(reference.predictions.index), 'image')} of {reference.split}, where the standard deviation "
        f"of the logits is {reference.logit_std:.3g}; the time is the median for one image alone on the CPU"
    )
    for name, result in results.items():
        for failure in result.failures:
            console.print(Text(f"{name} failed: {failure}", "red"))

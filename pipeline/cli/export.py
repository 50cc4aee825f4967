"""python -m pipeline export: a run's network for other runtimes, each file proven equal to it before it is called good."""

import argparse
import hashlib
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.table import Table
from rich.text import Text

from pipeline.config.loader import load_config
from pipeline.config.schema import Config
from pipeline.console import Console, python_executable
from pipeline.errors import RunError, UserError, suggest
from pipeline.export.directory import FAILED, FILES, ExportDirectory, prepare
from pipeline.runs import run_directory
from pipeline.runs.run_directory import RunDirectory

if TYPE_CHECKING:
    from pipeline.export.loading import LoadedExport
    from pipeline.export.verification import ParityReport, ReferenceResult

PACKAGES = {  # what a format is written and loaded back with, beside TensorFlow: its modules, and the packages that they are in
    "savedmodel": {},
    "litert": {"ai_edge_litert": "ai-edge-litert"},
    "litert-int8": {"ai_edge_litert": "ai-edge-litert"},
    "onnx": {"tf2onnx": "tf2onnx", "onnx": "onnx", "onnxruntime": "onnxruntime"},
}
LOSSY = ("litert-int8",)
BATCH = 32  # images, at most


class ExportResult(NamedTuple):
    """What became of a format."""

    size: int | None
    """Bytes; None where it could not be written."""
    proof: "ParityReport | None"
    """None where it could not be run, either."""
    failures: tuple[str, ...]
    """Why it is not the model; empty if it is."""


def formats(text: str) -> tuple[str, ...]:
    """The formats of a list with commas, each once."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in FILES:
            raise argparse.ArgumentTypeError(f"there is no format {name!r}{suggest(name, FILES)}")
    return names


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """The command line behind the program's name."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline export",
        description="Write a run's network for other runtimes, load each file back in its own, and compare both on every image of a split.",
        epilog="Exit code: 0 if every file is as good as the model, 1 if one is not; that one is kept apart, in failed/.",
    )
    parser.add_argument("--run", required=True, help="a run's directory, its MLflow id, or latest")
    parser.add_argument("--formats", type=formats, default=tuple(FILES), help=f"of {','.join(FILES)} (default: all)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to (default: export/ in the run's directory)")
    parser.add_argument("--split", choices=["train", "val", "test"], help="the split to compare on (default: test)")
    parser.add_argument(
        "overrides", nargs="*", metavar="export.key=value", help="other limits than the run's config has"
    )
    arguments = parser.parse_intermixed_args(words)
    for override in arguments.overrides:
        if not override.startswith("export."):
            parser.error(
                f"{override}: only keys of export can be changed here, as in export.min_agreement=0.98; the rest is as trained"
            )
    return arguments


def main(words: Sequence[str], screen: Console) -> int:
    """Runs the program; returns its exit code."""
    arguments = parse_arguments(words)
    run = run_directory.find(arguments.run)
    if not run.model.exists():
        raise RunError(
            f"{run.path}: has no model.keras yet; finish it with: {python_executable()} train.py --config ... --run-dir {run.path} --resume"
        )
    config = load_config(run.config, arguments.overrides)
    check_packages(arguments.formats)
    with run.exclusive_lock():
        digest = hashlib.sha256(run.model.read_bytes()).hexdigest()
        directory = prepare(arguments.out or run.export, arguments.formats, digest)
        screen.redirect_library_output(run.log)
        return export(run, config, directory, arguments.formats, arguments.split, digest, screen)


def check_packages(names: Sequence[str]) -> None:
    """Makes sure that the formats can be written and loaded back.

    Raises:
        UserError: A package is missing; all of these are named.
    """
    missing = {
        package: name for name in names for module, package in PACKAGES[name].items() if find_spec(module) is None
    }
    if missing:
        raise UserError(
            f"{', '.join(dict.fromkeys(missing.values()))} needs {', '.join(missing)}, which is not installed: "
            f"{python_executable()} -m pip install --constraint constraints.txt '.[export]', or choose other --formats"
        )


def export(
    run: RunDirectory,
    config: Config,
    directory: ExportDirectory,
    names: Sequence[str],
    split: str | None,
    digest: str,
    screen: Console,
) -> int:
    """Writes and proves every format, then puts all of them in their places; returns the exit code."""
    import keras
    import tensorflow as tf

    from pipeline.data.input_pipeline import evaluation_stream
    from pipeline.data.manifest import Manifest
    from pipeline.data.sources.catalog import open_source
    from pipeline.export import formats as written
    from pipeline.export import loading as loaded
    from pipeline.export.verification import check_parity, run_reference

    tf.config.set_visible_devices(
        [], "GPU"
    )  # the other runtimes use the CPU: only there do latencies and last digits compare
    manifest = Manifest.load(run.manifest)
    if split is None:
        split = "test" if len(manifest.indices("test")) else "val"
    if not len(manifest.indices(split)):
        raise RunError(f"{run.path}: its data have no split {split}")
    source, contract = (
        open_source(config.data),
        written.ModelSignature(manifest.class_names, config.variant.resolution, config.data.resize),
    )
    images = evaluation_stream(manifest, source, config, split, batch_size=min(BATCH, config.train.micro_batch_size))
    some = written.calibration_rows(manifest, config.export.calibration_images, config.seed)
    calibration = evaluation_stream(manifest, source, config, "train", batch_size=1, rows=some)
    ways: dict[str, tuple[Callable[..., None], Callable[[Path], LoadedExport]]] = {
        "savedmodel": (written.write_saved_model, loaded.open_saved_model),
        "litert": (written.write_litert, loaded.open_litert),
        "litert-int8": (partial(written.write_litert, calibration=calibration), loaded.open_litert),
        "onnx": (written.write_onnx, loaded.open_onnx),
    }
    model = keras.saving.load_model(run.model, compile=False)
    screen.print(
        f"{run.path}: EfficientNet-{config.variant.name} at {config.variant.resolution} px, compared on all images of {split}"
    )
    with screen.progress(f"model.keras: measuring {split}") as count:
        reference = run_reference(loaded.run_model(model), contract.class_names, images, split, count)
    outcomes = {}
    with directory.staged() as staging:
        for name in names:
            write, load = ways[name]
            with screen.progress(f"{name}: measuring {split}") as count:
                compare = partial(
                    check_parity,
                    reference=reference,
                    dataset=images,
                    limits=config.export,
                    exact=name not in LOSSY,
                    progress=count,
                )
                outcomes[name] = attempt(name, staging / FILES[name], partial(write, model, contract), load, compare)
        directory.publish(
            {"model": {"run": str(run.path), "sha256": digest, "variant": config.variant.name}, **contract.describe()},
            {name: entry(name, outcome, reference, config) for name, outcome in outcomes.items()},
            contract.class_names,
        )
    print_results(outcomes, reference, run.model.stat().st_size, screen)
    screen.print(f"written to {directory.path}")
    return 1 if any(outcome.failures for outcome in outcomes.values()) else 0


def attempt(
    name: str,
    path: Path,
    write: Callable[[Path], None],
    load: "Callable[[Path], LoadedExport]",
    compare: "Callable[[LoadedExport], ParityReport]",
) -> ExportResult:
    """Writes a format, loads it back and compares. Whatever converters and runtimes raise is a failure of this format alone."""
    try:
        write(path)
    except Exception as error:
        logging.getLogger("pipeline").exception("%s cannot be written", name)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return ExportResult(None, None, (f"cannot be written: {_short(error)}",))
    files = path.rglob("*") if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files if file.is_file())
    try:
        proof = compare(load(path))
    except Exception as error:
        logging.getLogger("pipeline").exception("%s cannot be run", name)
        return ExportResult(size, None, (f"cannot be loaded back and run: {_short(error)}",))
    return ExportResult(size, proof, proof.failures)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def entry(name: str, outcome: ExportResult, reference: "ReferenceResult", config: Config) -> dict[str, Any]:
    """What `metadata.json` says of a format."""
    from pipeline.distributed.devices import processor

    place = f"{FAILED}/" if outcome.failures else ""
    found: dict[str, Any] = {
        "file": None if outcome.size is None else place + FILES[name],
        "passed": not outcome.failures,
        "failures": list(outcome.failures),
        "bytes": outcome.size,
        "limits": config.export.model_dump(mode="json"),
        "versions": {package: version(package) for package in ("tensorflow", "keras", *PACKAGES[name].values())},
    }
    if (proof := outcome.proof) is not None:
        figures = {
            "max_logit_difference": proof.max_logit_difference,
            "logit_std": reference.logit_std,
            "top1_agreement": proof.agreement,
            "accuracy": proof.accuracy,
            "model_accuracy": reference.accuracy,
            "latency_ms": proof.latency * 1e3,
            "model_latency_ms": reference.latency * 1e3,
        }
        found["proof"] = {
            "split": reference.split,
            "images": len(reference.predictions.index),
            "machine": processor(),
            **{key: value if math.isfinite(value) else None for key, value in figures.items()},
        }
    return found


def print_results(
    outcomes: Mapping[str, ExportResult], reference: "ReferenceResult", model_size: int, screen: Console
) -> None:
    """Prints a row for the model and for each format, and why those that failed did."""
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
    for name, (size, proof, failures) in outcomes.items():
        figures = (
            ("-", "-", "-", "-")
            if proof is None
            else (
                f"{proof.max_logit_difference:.2g}",
                f"{proof.agreement:.2%}",
                f"{proof.accuracy:.2%}",
                f"{proof.latency * 1e3:.1f}",
            )
        )
        verdict = Text("failed", "bold red") if failures else Text("passed", "green")
        table.add_row(name, "-" if size is None else f"{size / 1e6:.1f}", *figures, verdict)
    screen.print(table)
    screen.print(
        f"over {len(reference.predictions.index):,} images of {reference.split}, where the logits' standard deviation is "
        f"{reference.logit_std:.3g}; the time is the median for one image alone on the CPU"
    )
    for name, outcome in outcomes.items():
        for failure in outcome.failures:
            screen.print(Text(f"{name} failed: {failure}", "red"))

"""Measure how fast a config trains on this machine, what limits it, and how it compares with plain Keras."""

import argparse
import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from pipeline.cli.arguments import add_config, add_overrides, check_folder, command_parser, local_path, positive_int
from pipeline.config.loader import load_config
from pipeline.console import Console
from pipeline.files import atomic_write

if TYPE_CHECKING:
    from pipeline.benchmark.throughput import BenchmarkResult


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser(
        "bench",
        "Time the training step alone, the input pipeline alone, and both together. The trained weights are discarded.",
    )
    add_config(parser, "lite0_flowers17")
    parser.add_argument(
        "--stage", type=int, metavar="N", help="the stage of the config to time, from 1 (default: the last)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=20.0,
        help="duration of each measurement; with --baseline of each round (default: %(default)s)",
    )
    parser.add_argument(
        "--baseline", choices=["keras-fit", "keras-step"], help="instead, time this in turns with plain Keras"
    )
    parser.add_argument(
        "--pairs", type=positive_int, default=7, help="with --baseline: number of rounds (default: %(default)s)"
    )
    parser.add_argument("--json", type=local_path, metavar="FILE", help="write the results as JSON")
    add_overrides(parser, "data.path=IMAGES")
    arguments = parser.parse_intermixed_args(argv)
    if not 0 < arguments.seconds < float("inf"):
        parser.error("--seconds must be above 0 and finite")
    return arguments


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
    if config.recipe is None:
        config.train.stage(arguments.stage)  # raises now if there is no such stage
    console.redirect_library_output(None)

    from pipeline.benchmark.throughput import ThroughputBenchmark
    from pipeline.training.memory import translate_oom_error

    bench = ThroughputBenchmark(config, console, stage=arguments.stage)
    variant, trained = bench.config.variant, bench.config.train.stages[0].trainable
    title = (
        f"EfficientNet-{variant.name} at {variant.resolution} px on {bench.runtime.describe()}, "
        f"{bench.batch_size} images per step, training {trained}"
    )
    console.print(title)
    figures: dict[str, Any] = {
        "what": title,
        "config": str(arguments.config),
        "overrides": arguments.overrides,
        **machine(),
    }
    console.print("timing; other programs that run meanwhile distort the results ...")
    if arguments.baseline is None:
        with translate_oom_error(bench.resolved.batch_size, bench.config.optimizer, bench.runtime, bench.state.model):
            measured = bench.measure(arguments.seconds)
        print_result(measured, console)
        figures |= asdict(measured) | {"bound": measured.bound}
    else:
        from pipeline.benchmark.keras_baseline import run_keras_baseline

        with (
            translate_oom_error(bench.resolved.batch_size, bench.config.optimizer, bench.runtime, bench.state.model),
            console.progress(f"in turns with {arguments.baseline}") as progress,
        ):
            pairs = run_keras_baseline(
                bench, arguments.baseline, seconds=arguments.seconds, pairs=arguments.pairs, progress=progress
            )
        ratios = print_pairs(pairs, arguments.baseline, console)
        figures |= {"baseline": arguments.baseline, "pairs": pairs, "median_ratio": statistics.median(ratios)}
    if arguments.json is not None:
        atomic_write(arguments.json, json.dumps(figures, indent=1) + "\n")
        console.print(f"results  {arguments.json}", wrap=False)
    return 0


def print_result(result: "BenchmarkResult", console: Console) -> None:
    """Print the rates, the bottleneck, and the time of each part of the input pipeline."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row(
        "step alone",
        f"{result.step:,.1f} images/s",
        f"first one after {result.first_step_seconds:.1f} s, with compilation",
    )
    table.add_row(
        "stream alone", f"{result.stream:,.1f} images/s", f"first batch after {result.first_batch_seconds:.1f} s"
    )
    table.add_row("both together", f"{result.training:,.1f} images/s", f"{result.share:.1%} of the smaller one")
    table.add_row("peak memory", f"{result.peak_bytes / 2**30:.2f} GiB", "")
    console.print(table)
    other = {"step": "stream", "stream": "step"}[result.bound]
    ratio = max(result.step, result.stream) / min(result.step, result.stream)
    console.print(f"the {result.bound} is what holds training back: the {other} alone is {ratio:,.1f} times as fast")
    parts = Table(
        title="the stream, milliseconds for an image on one thread", title_justify="left", box=None, pad_edge=False
    )
    for name in (*result.parts, "together"):
        parts.add_column(name, justify="right")
    parts.add_row(*(f"{value:.2f}" for value in (*result.parts.values(), sum(result.parts.values()))))
    console.print(parts)


def print_pairs(pairs: Sequence[tuple[float, float]], baseline: str, console: Console) -> list[float]:
    """Print the rounds with the ratios of their rates, and return the ratios."""
    ratios = [here / there for here, there in pairs]
    table = Table(box=None, pad_edge=False)
    for name in ("images/s", "here", baseline, "ratio"):
        table.add_column(name, justify="right")
    for number, ((here, there), ratio) in enumerate(zip(pairs, ratios, strict=True), 1):
        table.add_row(f"round {number}", f"{here:,.1f}", f"{there:,.1f}", f"{ratio:.2f}")
    console.print(table)
    console.print(
        f"{statistics.median(ratios):.2f} times {baseline} "
        f"(median of {len(pairs)}; {min(ratios):.2f} to {max(ratios):.2f})"
    )
    return ratios


def machine() -> dict[str, Any]:
    """Return the processor and the versions of Python, TensorFlow and Keras."""
    import keras
    import tensorflow as tf

    from pipeline.distributed.devices import processor_name

    versions = {"python": platform.python_version(), "tensorflow": tf.__version__, "keras": keras.__version__}
    return {"machine": processor_name(), "versions": versions}

"""python -m pipeline bench: how fast a config trains on this machine, what holds it back, and how it compares with plain Keras."""

import argparse
import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from pipeline.config.loader import load_config
from pipeline.console import Console
from pipeline.errors import UserError
from pipeline.runs import run_directory

if TYPE_CHECKING:
    from pipeline.benchmark.throughput import BenchmarkResult


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """The command line behind the program's name."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline bench",
        description="Time the training step alone, the input stream alone, and both together. Nothing is trained for keeps.",
    )
    parser.add_argument("--config", type=Path, required=True, help="a YAML file, such as configs/lite0_flowers17.yaml")
    parser.add_argument(
        "--stage", type=int, metavar="N", help="the stage of the config to time, from 1 (default: the last)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=20.0,
        help="for each measurement; with --against for each round (default: %(default)s)",
    )
    parser.add_argument(
        "--against", choices=["keras-fit", "keras-step"], help="time plain Keras in turns with this instead"
    )
    parser.add_argument("--pairs", type=int, default=7, help="with --against: rounds of each (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the config, such as data.path=PHOTOS"
    )
    arguments = parser.parse_intermixed_args(words)
    if not 0 < arguments.seconds < float("inf"):
        parser.error("--seconds must be above 0 and finite")
    if arguments.pairs < 1:
        parser.error("--pairs must be at least 1")
    return arguments


def main(words: Sequence[str], screen: Console) -> int:
    """Runs the program; returns its exit code."""
    arguments = parse_arguments(words)
    config = load_config(arguments.config, arguments.overrides)
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise UserError(f"{arguments.json}: there is no folder {arguments.json.parent}; make it first")
    if config.recipe is None:
        config.train.stage(arguments.stage)  # answers at once if there is none
    screen.redirect_library_output(None)

    from pipeline.benchmark.throughput import ThroughputBenchmark
    from pipeline.training.memory import translate_oom_error

    bench = ThroughputBenchmark(config, screen, stage=arguments.stage)
    variant, trained = bench.config.variant, bench.config.train.stages[0].trainable
    title = (
        f"EfficientNet-{variant.name} at {variant.resolution} px on {bench.runtime.describe()}, {bench.batch_size} images per step, "
        f"training {trained}"
    )
    screen.print(title)
    figures: dict[str, Any] = {
        "what": title,
        "config": str(arguments.config),
        "overrides": arguments.overrides,
        **machine(),
    }
    screen.print("timing; let nothing else run beside it ...")
    if arguments.against is None:
        with translate_oom_error(bench.config, bench.runtime, bench.state.model):
            measured = bench.measure(arguments.seconds)
        print_result(measured, screen)
        figures |= asdict(measured) | {"bound": measured.bound}
    else:
        from pipeline.benchmark.keras_baseline import run_keras_baseline

        with (
            translate_oom_error(bench.config, bench.runtime, bench.state.model),
            screen.progress(f"in turns with {arguments.against}") as count,
        ):
            pairs = run_keras_baseline(
                bench, arguments.against, seconds=arguments.seconds, pairs=arguments.pairs, progress=count
            )
        ratios = print_pairs(pairs, arguments.against, screen)
        figures |= {"against": arguments.against, "pairs": pairs, "median_ratio": statistics.median(ratios)}
    if arguments.json is not None:
        run_directory.write(arguments.json, json.dumps(figures, indent=1) + "\n")
        screen.print(f"figures  {arguments.json}")
    return 0


def print_result(figures: "BenchmarkResult", screen: Console) -> None:
    """Prints the rates, who holds whom back, and the parts of the stream."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row(
        "step alone",
        f"{figures.step:,.1f} images/s",
        f"first one after {figures.first_step_seconds:.1f} s, with compilation",
    )
    table.add_row(
        "stream alone", f"{figures.stream:,.1f} images/s", f"first batch after {figures.first_batch_seconds:.1f} s"
    )
    table.add_row("both together", f"{figures.training:,.1f} images/s", f"{figures.share:.1%} of the smaller one")
    table.add_row("peak memory", f"{figures.peak_bytes / 2**30:.2f} GiB", "")
    screen.print(table)
    other = {"step": "stream", "stream": "step"}[figures.bound]
    ratio = max(figures.step, figures.stream) / min(figures.step, figures.stream)
    screen.print(f"the {figures.bound} is what holds training back: the {other} alone is {ratio:,.1f} times as fast")
    parts = Table(
        title="the stream, milliseconds for an image on one thread", title_justify="left", box=None, pad_edge=False
    )
    for name in (*figures.parts, "together"):
        parts.add_column(name, justify="right")
    parts.add_row(*(f"{value:.2f}" for value in (*figures.parts.values(), sum(figures.parts.values()))))
    screen.print(parts)


def print_pairs(pairs: Sequence[tuple[float, float]], rival: str, screen: Console) -> list[float]:
    """Prints the rounds and their ratios, which are returned."""
    ratios = [here / there for here, there in pairs]
    table = Table(box=None, pad_edge=False)
    for name in ("images/s", "here", rival, "ratio"):
        table.add_column(name, justify="right")
    for number, ((here, there), ratio) in enumerate(zip(pairs, ratios, strict=True), 1):
        table.add_row(f"round {number}", f"{here:,.1f}", f"{there:,.1f}", f"{ratio:.2f}")
    screen.print(table)
    screen.print(
        f"{statistics.median(ratios):.2f} times {rival} (median of {len(pairs)}; {min(ratios):.2f} to {max(ratios):.2f})"
    )
    return ratios


def machine() -> dict[str, Any]:
    """What the figures were measured with."""
    import keras
    import tensorflow as tf

    from pipeline.distributed.devices import processor

    versions = {"python": platform.python_version(), "tensorflow": tf.__version__, "keras": keras.__version__}
    return {"machine": processor(), "versions": versions}

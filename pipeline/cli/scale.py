"""python -m pipeline scale: compound scaling as a table, as a grid search, and solved for a budget."""

import argparse
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.console import Console, python_executable
from pipeline.errors import UserError
from pipeline.models.variants import ALPHA, BETA, GAMMA, VARIANTS, phi_of

if TYPE_CHECKING:
    from pipeline.models.compound_search import Solution, WeightOverlap

COUNT = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
BYTES = {
    "B": 1.0,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "TB": 1e12,
    "KiB": 2.0**10,
    "MiB": 2.0**20,
    "GiB": 2.0**30,
    "TiB": 2.0**40,
}
SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
NUMBER = r"\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?"


def quantity(units: Mapping[str, float], example: str) -> Callable[[str], float]:
    """A reader, for argparse, of a number above 0 with one of `units` right behind it."""

    def read(text: str) -> float:
        match = re.fullmatch(rf"({NUMBER})\s*([A-Za-z]*)", text.strip())
        if not match or match[2] not in units:
            named = ", ".join(unit or "none" for unit in units)
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a number with a unit; write it like {example} (units: {named})"
            )
        value = float(match[1]) * units[match[2]]
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} must be above 0 and finite")
        return value

    return read


def steps(text: str) -> list[float]:
    """Reads `start:stop:step`, both ends included, or a single number; none below 1, where nothing is scaled up."""
    parts = text.split(":")
    if len(parts) not in (1, 3) or not all(re.fullmatch(NUMBER, part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor start:stop:step, such as 1.0:1.5:0.1")
    start, stop, step = (float(part) for part in (parts if len(parts) == 3 else (parts[0], parts[0], "1")))
    if not (1 <= start <= stop <= 4 and step >= 0.001):
        raise argparse.ArgumentTypeError(f"{text!r} must rise from at least 1 to at most 4, in steps of at least 0.001")
    return [round(start + i * step, 6) for i in range(math.floor((stop - start) / step + 1e-9) + 1)]


def positive(text: str) -> int:
    """Reads an integer above 0."""
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """The command line behind the program's name."""
    scale = argparse.ArgumentParser(
        prog="python -m pipeline scale",
        description="Compound scaling (arXiv 1905.11946). Without options it prints the family.",
    )
    search = scale.add_argument_group("grid search at phi = 1 (start:stop:step, or one number)")
    search.add_argument("--search", action="store_true", help="list the triples with alpha * beta^2 * gamma^2 near 2")
    search.add_argument(
        "--alpha", type=steps, default="1.0:1.5:0.1", help="multipliers of the depth (default: %(default)s)"
    )
    search.add_argument(
        "--beta", type=steps, default="1.0:1.4:0.05", help="multipliers of the width (default: %(default)s)"
    )
    search.add_argument(
        "--gamma", type=steps, default="1.0:1.4:0.05", help="multipliers of the resolution (default: %(default)s)"
    )
    search.add_argument(
        "--tolerance",
        type=quantity({"": 1.0}, "0.1"),
        default="0.1",
        help="how far from 2 the product may be (default: %(default)s)",
    )
    search.add_argument("--top", type=positive, default=10, help="how many to show (default: %(default)s)")
    budget = scale.add_argument_group("the largest phi within a budget")
    budget.add_argument("--params", type=quantity(COUNT, "8e6 or 8M"), help="trainable parameters")
    budget.add_argument("--flops", type=quantity(COUNT, "1e9 or 1G"), help="multiply-adds per image")
    budget.add_argument(
        "--memory", type=quantity(BYTES, "4GiB"), help="estimated memory of a training step, such as 4GiB"
    )
    budget.add_argument(
        "--latency", type=quantity(SECONDS, "50ms"), help="time for one image on this machine, such as 50ms"
    )
    budget.add_argument(
        "--write", type=Path, metavar="CONFIG", help="write a config that trains the network; needs --data-path"
    )
    budget.add_argument(
        "--data-path", type=Path, metavar="PHOTOS", help="the folder that the written config trains on: <class>/<image>"
    )
    scale.add_argument(
        "--batch-size", type=positive, default=32, help="images per step, for the memory (default: %(default)s)"
    )
    scale.add_argument("--classes", type=positive, default=1000, help="outputs of the network (default: %(default)s)")
    arguments = scale.parse_args(words)
    solving = any(getattr(arguments, name) is not None for name in ("params", "flops", "memory", "latency"))
    if arguments.search and (solving or arguments.write):
        scale.error("--search and a budget are two questions; ask one at a time")
    if arguments.write and not solving:
        scale.error("--write needs a budget: --params, --flops, --memory or --latency")
    if (arguments.write is None) != (arguments.data_path is None):
        scale.error("--write and --data-path belong together")
    arguments.solving = solving
    return arguments


def main(words: Sequence[str], screen: Console) -> int:
    """Runs the program; returns its exit code."""
    arguments = parse_arguments(words)
    if arguments.write is not None:
        check_writable(arguments.write)
    screen.redirect_library_output(None)
    if arguments.search:
        search(arguments, screen)
    elif arguments.solving:
        solve(arguments, screen)
    else:
        family(arguments, screen)
    return 0


def family(arguments: argparse.Namespace, screen: Console) -> None:
    """Prints every published variant, and what the formula gives at its resolution."""
    from pipeline.models.compound_search import size_of

    rows = []
    with screen.progress("building the family") as count:
        for done, variant in enumerate(VARIANTS.values(), 1):
            size = size_of(variant, num_classes=arguments.classes, batch_size=arguments.batch_size)
            phi = phi_of(variant.resolution)
            line = "" if variant.lite else f"  {phi:8.2f} {BETA**phi:6.2f} {ALPHA**phi:6.2f}"
            rows.append(
                f"{variant.name:<7} {variant.width:5.1f} {variant.depth:5.1f} {variant.resolution:6} {variant.dropout:7.1f} "
                f"{size.blocks:6} {size.parameters:12,} {size.flops / 1e9:8.2f} G{line}"
            )
            count(done, len(VARIANTS))
    screen.print(f"{'':66} the formula at this resolution")
    screen.print("variant width depth pixels dropout blocks   parameters  mult-adds       phi  width  depth")
    for row in rows:
        screen.print(row)
    screen.print(
        f"\nThe formula: width {BETA}^phi, depth {ALPHA}^phi, 224 * {GAMMA}^phi pixels. The published B1 to B7 were picked by hand near "
        f"that line.\nTrainable parameters with {arguments.classes:,} classes; multiply-adds per image, both of the network as built."
    )


def search(arguments: argparse.Namespace, screen: Console) -> None:
    """Prints the triples of the grid, by how closely they double the multiply-adds."""
    from pipeline.models.compound_search import flops_ratios, grid, once_per_architecture, size_of

    triples = grid(arguments.alpha, arguments.beta, arguments.gamma, arguments.tolerance)
    if not triples:
        raise UserError(
            f"--tolerance: no triple of the grid has alpha * beta^2 * gamma^2 within {arguments.tolerance:g} of 2; "
            "take smaller steps, wider ranges or a larger tolerance"
        )
    flops = once_per_architecture(lambda variant: size_of(variant).flops)
    with screen.progress("building the candidates") as count:
        candidates = flops_ratios(triples, flops, count)
    screen.print("alpha (depth)  beta (width)  gamma (resolution)  product  measured")
    for found in candidates[: arguments.top]:
        screen.print(
            f"{found.alpha:13g}  {found.beta:12g}  {found.gamma:18g}  {found.product:7.3f}  {found.flops_ratio:8.3f}"
        )
    screen.print(
        f"\n{min(arguments.top, len(candidates))} of {len(candidates)} triples with alpha * beta^2 * gamma^2 within "
        f"{arguments.tolerance:g} of 2. measured: the multiply-adds of the network\nso scaled over B0's; it differs from "
        "the product because repeats are rounded up and "
        "channels to multiples of 8. Which triple\nis the most accurate only training tells: the paper trained them, and took "
        f"{ALPHA}, {BETA}, {GAMMA}."
    )


def solve(arguments: argparse.Namespace, screen: Console) -> None:
    """Prints the largest network of the compound line within the budgets, and writes its config if asked to."""
    import tensorflow as tf

    from pipeline.distributed.devices import processor
    from pipeline.models.compound_search import (
        Budget,
        best_fit,
        largest_within,
        latency_of,
        nearest_published,
        once_per_architecture,
        size_of,
    )

    size = once_per_architecture(
        lambda variant: size_of(variant, num_classes=arguments.classes, batch_size=arguments.batch_size)
    )
    latency = once_per_architecture(lambda variant: latency_of(variant, num_classes=arguments.classes))
    possible = (  # the cheapest to measure first
        (
            "parameters",
            arguments.params,
            lambda variant: size(variant).parameters,
            lambda value: f"{value / 1e6:,.3f} M",
        ),
        ("multiply-adds", arguments.flops, lambda variant: size(variant).flops, lambda value: f"{value / 1e9:,.4f} G"),
        ("memory", arguments.memory, lambda variant: size(variant).memory, lambda value: f"{value / 2**30:,.3f} GiB"),
        ("latency", arguments.latency, latency, lambda value: f"{value * 1e3:,.1f} ms"),
    )
    budgets = [Budget(*given) for given in possible if given[1] is not None]
    screen.print("building networks along the compound line" + ("; timing them" if arguments.latency else ""))
    solution = largest_within(budgets)
    variant, near = solution.variant, nearest_published(solution.variant)
    lines = [f"{'budget':<14} {'limit':>14} {'network':>14}   left"]
    for budget in budgets:
        value = budget.measure(variant)
        binds = "  binds" if budget.name == solution.binding else ""
        lines.append(
            f"{budget.name:<14} {budget.show(budget.limit):>14} {budget.show(value):>14} {1 - value / budget.limit:6.1%}{binds}"
        )
    if solution.binding is None:
        lines.append("no budget binds: this is the largest phi that a config takes")
    if arguments.memory:
        lines.append(f"memory: estimated, {arguments.batch_size} images per step in float32")
    if arguments.latency:
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        lines.append(f"latency: median of warm inferences of one image in float32 on {devices[0].name}, {processor()}")
    built = size(variant)
    screen.print(
        f"phi = {solution.phi:g}: {{width: {variant.width:.4f}, depth: {variant.depth:.4f}, resolution: {variant.resolution}}}"
    )
    screen.print(
        f"{built.parameters:,} parameters with {arguments.classes:,} classes, {built.flops / 1e9:.3f} G multiply-adds"
    )
    screen.print(
        f"nearest published: {near.name}, {{width: {near.width}, depth: {near.depth}, resolution: {near.resolution}}}\n"
    )
    screen.print("\n".join(lines))
    if arguments.write is not None:
        write_config(arguments, "\n".join(lines), solution, best_fit(variant), screen)


def check_writable(path: Path) -> None:
    """Refuses a config's path before anything is computed for it."""
    if path.exists() or path.is_symlink():
        raise UserError(f"{path}: exists already and is not overwritten; give --write another name, or remove it")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it first")


def write_config(
    arguments: argparse.Namespace, header: str, solution: "Solution", fit: "WeightOverlap", screen: Console
) -> None:
    """Writes the config of a solution; never over a file that is there."""
    from pipeline.models.compound_search import training_config

    text = training_config(solution, fit, arguments.data_path, batch_size=arguments.batch_size, header=header)
    try:
        with arguments.write.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{arguments.write}: cannot be written ({error.strerror}); give --write another name") from None
    screen.print(f"\nwritten: {arguments.write}; train with: {python_executable()} train.py --config {arguments.write}")

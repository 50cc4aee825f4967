"""Compound scaling: the table of variants, the grid search for its constants, and the largest model within a budget."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from pipeline.cli.arguments import (
    BYTES,
    COUNT,
    SECONDS,
    check_folder,
    command_parser,
    local_path,
    positive_int,
    quantity,
    value_range,
)
from pipeline.console import Console, command_line, plural
from pipeline.errors import UserError
from pipeline.models.variants import ALPHA, BETA, GAMMA, VARIANTS, phi_of

if TYPE_CHECKING:
    from pipeline.models.compound_search import Solution, WeightOverlap


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser(
        "scale", "Compound scaling (arXiv 1905.11946). Without options, the command lists the published variants."
    )
    search = parser.add_argument_group("grid search at phi = 1 (start:stop:step, or one number)")
    search.add_argument("--search", action="store_true", help="list the triples with alpha * beta^2 * gamma^2 near 2")
    search.add_argument(
        "--alpha", type=value_range, default="1.0:1.5:0.1", help="multipliers of the depth (default: %(default)s)"
    )
    search.add_argument(
        "--beta", type=value_range, default="1.0:1.4:0.05", help="multipliers of the width (default: %(default)s)"
    )
    search.add_argument(
        "--gamma", type=value_range, default="1.0:1.4:0.05", help="multipliers of the resolution (default: %(default)s)"
    )
    search.add_argument(
        "--tolerance",
        type=quantity({"": 1.0}, "0.1"),
        default="0.1",
        help="largest distance of the product from 2 (default: %(default)s)",
    )
    search.add_argument("--top", type=positive_int, default=10, help="number of triples to show (default: %(default)s)")
    budget = parser.add_argument_group("the largest phi within a budget")
    budget.add_argument("--params", type=quantity(COUNT, "8e6 or 8M"), help="trainable parameters")
    budget.add_argument("--flops", type=quantity(COUNT, "1e9 or 1G"), help="multiply-adds per image")
    budget.add_argument(
        "--memory", type=quantity(BYTES, "4GiB"), help="estimated memory of a training step, such as 4GiB"
    )
    budget.add_argument(
        "--latency", type=quantity(SECONDS, "50ms"), help="time for one image on this machine, such as 50ms"
    )
    budget.add_argument(
        "--write", type=local_path, metavar="CONFIG", help="write a config that trains the model; needs --data-path"
    )
    budget.add_argument(
        "--data-path",
        type=local_path,
        metavar="FOLDER",
        help="the folder that the written config trains on: <class>/<image>",
    )
    parser.add_argument(
        "--batch-size", type=positive_int, default=32, help="images per step, for the memory (default: %(default)s)"
    )
    parser.add_argument(
        "--classes", type=positive_int, default=1000, help="outputs of the model (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    solving = any(getattr(arguments, name) is not None for name in ("params", "flops", "memory", "latency"))
    if arguments.search and (solving or arguments.write):
        parser.error("--search and a budget exclude each other; use one at a time")
    if arguments.write and not solving:
        parser.error("--write needs a budget: --params, --flops, --memory or --latency")
    if (arguments.write is None) != (arguments.data_path is None):
        parser.error("--write and --data-path belong together")
    arguments.solving = solving
    return arguments


def main(console: Console, argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        console: Console for the output.
        argv: Arguments; None takes those of the process.
    """
    arguments = parse_arguments(argv)
    if arguments.write is not None:
        check_writable(arguments.write)
    console.redirect_library_output(None)
    if arguments.search:
        search(arguments, console)
    elif arguments.solving:
        solve(arguments, console)
    else:
        family(arguments, console)
    return 0


def family(arguments: argparse.Namespace, console: Console) -> None:
    """Print every published variant, beside the formula's values at its resolution."""
    from pipeline.models.compound_search import profile_variant

    rows = []
    with console.progress("building the variants") as progress:
        for done, variant in enumerate(VARIANTS.values(), 1):
            size = profile_variant(variant, num_classes=arguments.classes, batch_size=arguments.batch_size)
            phi = phi_of(variant.resolution)
            line = "" if variant.family_name != "efficientnet" else f" {phi:6.2f} {BETA**phi:5.2f} {ALPHA**phi:5.2f}"
            rows.append(
                f"{variant.name:<7} {variant.width:5.1f} {variant.depth:5.1f} {variant.resolution:6} "
                f"{variant.dropout:4.1f} {size.blocks:6} {size.parameters:11,} {size.flops / 1e9:7.2f} G{line}"
            )
            progress(done, len(VARIANTS))
    console.print(f"{'':61} formula at this")
    console.print(f"{'':61} resolution")
    console.print("variant width depth pixels drop blocks  parameters mult-adds    phi width depth")
    for row in rows:
        console.print(row)
    console.print(
        f"\nThe formula: width {BETA}^phi, depth {ALPHA}^phi, 224 * {GAMMA}^phi pixels. The published B1 to B7 "
        "were chosen by hand near it. drop: dropout before the classifier. Trainable parameters with "
        f"{plural(arguments.classes, 'class', 'classes')}; multiply-adds per image. Both are counted on the model as "
        "built."
    )


def search(arguments: argparse.Namespace, console: Console) -> None:
    """Print the triples of the grid, those first that double the multiply-adds most closely."""
    from pipeline.models.compound_search import flops_ratios, grid, once_per_architecture, profile_variant

    triples = grid(arguments.alpha, arguments.beta, arguments.gamma, arguments.tolerance)
    if not triples:
        raise UserError(
            f"--tolerance: no triple of the grid has alpha * beta^2 * gamma^2 within {arguments.tolerance:g} of 2; "
            "take smaller steps, wider ranges or a larger tolerance"
        )
    flops = once_per_architecture(lambda variant: profile_variant(variant).flops)
    with console.progress("building the candidates") as progress:
        candidates = flops_ratios(triples, flops, progress)
    console.print("alpha (depth)  beta (width)  gamma (resolution)  product  measured")
    for candidate in candidates[: arguments.top]:
        console.print(
            f"{candidate.alpha:13g}  {candidate.beta:12g}  {candidate.gamma:18g}  "
            f"{candidate.product:7.3f}  {candidate.flops_ratio:8.3f}"
        )
    console.print(
        f"\n{min(arguments.top, len(candidates))} of {plural(len(candidates), 'triple')} with alpha * beta^2 * gamma^2 "
        f"within {arguments.tolerance:g} of 2. measured: the multiply-adds of the scaled model over those of B0. It "
        "differs from the product because repeats are rounded up and channels are rounded to multiples of 8. Only "
        f"training shows which triple is the most accurate: the paper trained them, and chose {ALPHA}, {BETA}, {GAMMA}."
    )


def solve(arguments: argparse.Namespace, console: Console) -> None:
    """Print the largest model of the compound scaling rule within the budgets, and write its config with --write."""
    import tensorflow as tf

    from pipeline.distributed.devices import processor_name
    from pipeline.models.compound_search import (
        Budget,
        best_fit,
        largest_within,
        latency_of,
        nearest_published,
        once_per_architecture,
        profile_variant,
    )

    size = once_per_architecture(
        lambda variant: profile_variant(variant, num_classes=arguments.classes, batch_size=arguments.batch_size)
    )
    latency = once_per_architecture(lambda variant: latency_of(variant, num_classes=arguments.classes))
    all_budgets = (  # those that are cheapest to measure first
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
    budgets = [Budget(*budget) for budget in all_budgets if budget[1] is not None]
    message = "building models of the compound scaling rule" + ("; timing them" if arguments.latency else "")
    console.print(f"{message} ...")
    with console.waiting(message):
        solution = largest_within(budgets)
    variant, nearest = solution.variant, nearest_published(solution.variant)
    lines = [f"{'budget':<14} {'limit':>14} {'model':>14}   left"]
    for budget in budgets:
        value = budget.measure(variant)
        binds = "  binds" if budget.name == solution.binding else ""
        lines.append(
            f"{budget.name:<14} {budget.show(budget.limit):>14} {budget.show(value):>14} "
            f"{1 - value / budget.limit:6.1%}{binds}"
        )
    if solution.binding is None:
        lines.append("no budget binds: this is the largest phi that a config accepts")
    if arguments.memory:
        lines.append(f"memory: estimated, {plural(arguments.batch_size, 'image')} per step in float32")
    if arguments.latency:
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        lines.append(
            f"latency: median of warm inferences of one image in float32 on {devices[0].name}, {processor_name()}"
        )
    profile = size(variant)
    console.print(
        f"phi = {solution.phi:g}: {{width: {variant.width:.4f}, depth: {variant.depth:.4f}, "
        f"resolution: {variant.resolution}}}"
    )
    console.print(
        f"{profile.parameters:,} parameters with {plural(arguments.classes, 'class', 'classes')}, "
        f"{profile.flops / 1e9:.3f} G multiply-adds"
    )
    console.print(
        f"nearest published: {nearest.name}, {{width: {nearest.width}, depth: {nearest.depth}, "
        f"resolution: {nearest.resolution}}}\n"
    )
    console.print("\n".join(lines))
    if arguments.write is not None:
        write_config(arguments, "\n".join(lines), solution, best_fit(variant), console)


def check_writable(path: Path) -> None:
    """Check that a config can be written to a new file, before anything is computed for it.

    Raises:
        UserError: The file exists, or its folder does not.
    """
    if path.exists() or path.is_symlink():
        raise UserError(
            f"{path}: exists already and is not overwritten; choose another name for --write, or remove the file"
        )
    check_folder(path)


def write_config(
    arguments: argparse.Namespace, header: str, solution: "Solution", fit: "WeightOverlap", console: Console
) -> None:
    """Write the config of a solution into a new file.

    Raises:
        UserError: The file cannot be written.
    """
    text = training_config(solution, fit, arguments.data_path, batch_size=arguments.batch_size, header=header)
    try:
        with arguments.write.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(
            f"{arguments.write}: cannot be written ({error.strerror}); choose another name for --write"
        ) from None
    console.print(
        f"\nwritten: {arguments.write}; train with: {command_line('train', '--config', arguments.write)}", wrap=False
    )


def training_config(
    solution: "Solution", fit: "WeightOverlap", data_path: Path, *, batch_size: int, header: str
) -> str:
    """Return a config that trains a solution on a folder of images.

    Args:
        solution: The network.
        fit: What `best_fit` says of it. Where a published variant is identical, its ImageNet weights are fine-tuned;
            else what fits of them is where training starts.
        data_path: The folder: <class>/<image>.
        batch_size: Images per step.
        header: Lines for the comment at its top: the budgets and what they came to.

    Returns:
        YAML.
    """
    variant = solution.variant
    scaled = f"width {variant.width:.3f}, depth {variant.depth:.3f}, {variant.resolution} px"
    if fit.identical:
        model = {"variant": fit.source, "resolution": variant.resolution, "weights": "imagenet"}
        stages = [
            {"epochs": 2, "trainable": "head", "base_lr": 0.02},
            {"epochs": 6, "base_lr": 0.004, "freeze_batch_norm": True},
        ]
        comments = [
            f"Rounded, this is {fit.source} at {variant.resolution} px: "
            "its ImageNet weights fit whole and are fine-tuned."
        ]
    else:
        weights = f"imagenet:{fit.source}" if fit.fitting else None
        model = {"variant": {"phi": solution.phi}, "weights": weights, "batch_norm_momentum": 0.9}
        stages = [{"epochs": 60, "warmup_epochs": 3.0}]
        comments = ["Starts from random values: no published weights fit."]
        if fit.fitting:
            comments = [
                f"Starts from {fit.source}'s ImageNet weights where names and shapes are equal, "
                f"in {fit.fitting} of {fit.total} backbone",
                "layers; the others are random at first, so all are trained. "
                "Without a network to fetch them: model.weights=null.",
            ]
    values = {
        "seed": 42,
        "model": model,
        "data": {"source": "folder", "path": str(data_path)},
        "augment": {"transforms": [{"RandomResizedCrop": {"scale": [0.35, 1.0]}}, {"HorizontalFlip": {"p": 0.5}}]},
        "optimizer": {"name": "adamw", "base_lr": 0.008, "schedule": "cosine", "weight_decay": 1e-4, "ema_decay": 0.98},
        "train": {"global_batch_size": batch_size, "label_smoothing": 0.1, "stages": stages},
        "tracking": {"experiment": "scaled"},
    }
    comment = [*header.splitlines(), f"phi = {solution.phi:g}: {scaled}.", *comments]
    return "".join(f"# {line}\n" for line in comment) + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

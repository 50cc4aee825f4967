"""What a run settles before its first step: the size of its batches, its data, what its recipe comes to, and whether XLA compiles it.

Of several processes the chief does so and tells the others: it alone reads all of the data.
"""

import json
from collections.abc import Collection

import keras

from pipeline.config.optimizer import OptimizerConfig
from pipeline.config.runtime import RuntimeConfig
from pipeline.config.schema import Config
from pipeline.config.train import TrainConfig
from pipeline.console import Console
from pipeline.data.input_pipeline import steps_per_epoch
from pipeline.data.manifest import Manifest
from pipeline.data.sources.base import DataSource
from pipeline.data.sources.catalog import open_source
from pipeline.data.validation import scan
from pipeline.distributed.devices import Runtime
from pipeline.distributed.process_group import ProcessGroup
from pipeline.runs.run_directory import RunDirectory
from pipeline.training.memory import check_batch, resolve_batch_size
from pipeline.training.recipe import resolve_recipe as settle_recipe
from pipeline.training.schedule import build_schedule
from pipeline.training.xla import resolve_xla


def open_data(config: Config, processes: ProcessGroup) -> DataSource:
    """Open the data set that the config names on every process, behind the chief, which fetches it where it is to be fetched.

    Raises:
        DataError: The data cannot be had, or their layout is not understood.
    """
    opened: list[DataSource] = []

    def on_the_chief() -> dict[str, bytes]:
        opened.append(open_source(config.data))
        return {}

    processes.broadcast_from_chief(on_the_chief)
    return opened[0] if opened else open_source(config.data)


def resolve_config(
    config: Config,
    run: RunDirectory,
    runtime: Runtime,
    source: DataSource,
    model: keras.Model,
    new: Collection[str],
    screen: Console,
    *,
    resume: bool,
) -> tuple[Config, Runtime, Manifest]:
    """Settles it.

    Args:
        config: As it is written.
        run: Its directory, which the chief reads and writes.
        runtime: Where the run takes place.
        source: Its data.
        model: What is to be trained.
        new: Its layers that no weights fit, by name.
        screen: Told of it.
        resume: Whether the run stays with what it settled before.

    Returns:
        The config with a decision in the place of auto, the runtime that it says, and the table of samples.

    Raises:
        UserError: The batch cannot be shared, or the data cannot be trained on.
    """
    settled: tuple[Config, Runtime, Manifest] | None = None

    def on_the_chief() -> dict[str, bytes]:
        nonlocal settled
        before = run.load_config() if resume else None
        fitted = resolve_batch_size(config, runtime, model, previous=before.train if before else None)
        check_batch(fitted, runtime)
        manifest = read_data(source, fitted, run, screen)
        fitted = settle_recipe(fitted, manifest, new, previous=before)
        if fitted != config and config.recipe is not None:
            words = " and ".join(f"{stage.epochs} epochs of {stage.trainable}" for stage in fitted.train.stages)
            screen.print(f"recipe: {words}, moving average {fitted.optimizer.ema_decay}")
        stages = build_schedule(fitted, steps_per_epoch(len(manifest.indices("train")), fitted.train.batch_size))
        fitted, compiled, reason = resolve_xla(fitted, runtime, model, stages, previous=before)
        if reason:
            screen.print(reason)
        settled = fitted, compiled, manifest
        if runtime.processes.world_size == 1:
            return {}
        sections = {name: getattr(fitted, name).model_dump(mode="json") for name in ("train", "optimizer", "runtime")}
        return {"sections": json.dumps(sections).encode(), "manifest": manifest.to_bytes()}

    told = runtime.processes.broadcast_from_chief(on_the_chief)
    if settled is None:
        sections = json.loads(told["sections"])
        train, optimizer = (
            TrainConfig.model_validate(sections["train"]),
            OptimizerConfig.model_validate(sections["optimizer"]),
        )
        config = config.model_copy(update={"recipe": None, "train": train, "optimizer": optimizer})
        of_the_chief = config.model_copy(update={"runtime": RuntimeConfig.model_validate(sections["runtime"])})
        config, runtime, _ = resolve_xla(config, runtime, model, (), previous=of_the_chief)
        settled = config, runtime, Manifest.from_bytes(told["manifest"])
    return settled


def read_data(source: DataSource, config: Config, run: RunDirectory, screen: Console) -> Manifest:
    """Scan the data: every sample is decoded before any training, by this scan or an earlier one of the same files."""
    with screen.progress("reading the data") as count:
        manifest = scan(source, config.data, seed=config.seed, progress=count)
    if manifest.left_out:
        manifest.write_left_out(run.skipped_images)
    sizes = ", ".join(f"{len(manifest.indices(split)):,} {split}" for split in ("train", "val", "test"))
    screen.print(f"data: {len(manifest.class_names)} classes; images: {sizes}")
    for note in manifest.notes:
        screen.print(f"note: {note}")
    if manifest.left_out:
        screen.print(
            f"left out: {len(manifest.left_out):,} pictures that cannot be used, listed in {run.skipped_images}"
        )
    return manifest

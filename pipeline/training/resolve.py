"""Resolution of a config: a value in the place of every `auto`, once, for training, dry run and benchmark.

In a run of several processes, the chief resolves and sends the result to the others: it alone scans the images.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass, replace

import keras

from pipeline.config.data import DataConfig
from pipeline.config.optimizer import OptimizerConfig
from pipeline.config.runtime import RuntimeConfig
from pipeline.config.schema import Config
from pipeline.config.train import TrainConfig
from pipeline.console import Console, plural
from pipeline.data.augmentation import image_augmentation
from pipeline.data.data_service import check_servable, check_servers
from pipeline.data.input_pipeline import steps_per_epoch
from pipeline.data.manifest import Manifest
from pipeline.data.sources.base import DataSource
from pipeline.data.sources.catalog import open_source
from pipeline.data.validation import scan
from pipeline.distributed.devices import Runtime
from pipeline.distributed.process_group import ProcessGroup
from pipeline.models.variants import Normalization
from pipeline.models.weights.sources import PretrainedWeights
from pipeline.runs.run_directory import RunDirectory
from pipeline.training.memory import BatchSize, check_batch, check_memory, resolve_batch_size
from pipeline.training.recipe import describe_recipe, resolve_recipe
from pipeline.training.schedule import TrainSchedule, build_schedule
from pipeline.training.xla import resolve_xla


@dataclass(frozen=True)
class ResolvedConfig:
    """A config with a value in the place of every `auto`, and what follows from it.

    Attributes:
        config: The config, with numbers and booleans for `auto`; a recipe is named, and all that it chooses is set.
        runtime: Devices and precision, with `jit_compile` decided.
        batch_size: Images of a step, a number.
        schedule: Steps and learning rates of all stages.
        xla_reason: Sentence with the reason for compiling or not; empty if there was nothing to decide.
    """

    config: Config
    runtime: Runtime
    batch_size: BatchSize
    schedule: TrainSchedule
    xla_reason: str = ""


def resolve_network(
    config: Config, weights: PretrainedWeights | None, run: RunDirectory, runtime: Runtime, *, resume: bool
) -> Config:
    """Resolve padding and normalization of the network, which the initial weights decide, on every process.

    Args:
        config: The config as written.
        weights: The initial weights; None for random ones, and for a resume.
        run: Directory of the run; the chief reads its config on a resume.
        runtime: Its processes receive what the chief resolves.
        resume: Keep the values that the run was started with.
    """

    def on_the_chief() -> dict[str, bytes]:
        if resume:
            variant = run.load_config().variant
        else:
            variant = weights.adapt(config.variant) if weights is not None else config.variant
        return {"network": json.dumps([variant.padding, variant.normalization]).encode()}

    padding, normalization = json.loads(runtime.processes.broadcast_from_chief(on_the_chief)["network"])
    network = {"padding": padding, "input_normalization": Normalization(*normalization)}
    return config.with_network(replace(config.variant, **network))


def resolve_batch(
    config: Config, runtime: Runtime, model: keras.Model, *, previous: Config | None = None
) -> tuple[Config, BatchSize]:
    """Resolve the batch size, and check that the replicas can share it and have the memory. This needs no data.

    Args:
        config: The config as written.
        runtime: Its replicas share the batch.
        model: The network to train.
        previous: The resolved config of the run that is resumed, if any; its batch size stays.

    Returns:
        The config with the batch size as a number, and that number.

    Raises:
        UserError: The batch does not fit into memory, or it cannot be shared.
    """
    batch_size = resolve_batch_size(
        config.train, config.optimizer, runtime, model, previous=previous.train if previous else None
    )
    check_batch(batch_size, config.augment, runtime)
    images, accumulation = batch_size
    train = config.train.model_copy(update={"global_batch_size": images, "gradient_accumulation_steps": accumulation})
    config = config.model_copy(update={"train": train})
    if config.recipe is None and previous is None:
        check_memory(config, batch_size, runtime, model)
    return config, batch_size


def resolve(
    config: Config,
    runtime: Runtime,
    model: keras.Model,
    manifest: Manifest,
    uninitialized_layers: Collection[str] = (),
    *,
    previous: Config | None = None,
) -> ResolvedConfig:
    """Resolve the batch size, the recipe, the schedule and the compilation, in this order.

    Args:
        config: The config as written, or what `resolve_batch` returned for it.
        runtime: Devices and precision, from `setup_devices`.
        model: The network to train. If XLA is to compile it, its fused layers are disabled.
        manifest: All images; the number of training images decides.
        uninitialized_layers: Names of the layers that the weights do not fit.
        previous: The resolved config of the run that is resumed, if any; its values stay.

    Raises:
        UserError: The batch does not suit the devices, or the data do not suit the config.
    """
    if config.runtime.data_service is not None:
        check_servable(manifest)
    config, batch_size = resolve_batch(config, runtime, model, previous=previous)
    config = resolve_recipe(config, manifest, batch_size.images, uninitialized_layers, previous=previous)
    if config.recipe is not None and previous is None:
        check_memory(config, batch_size, runtime, model)  # the recipe has chosen the stages now
    schedule = build_schedule(
        config.train.stages,
        config.optimizer,
        global_batch_size=batch_size.images,
        steps_per_epoch=steps_per_epoch(len(manifest.indices("train")), batch_size.images),
    )
    config, runtime, reason = resolve_xla(config, runtime, model, schedule, previous=previous)
    return ResolvedConfig(config, runtime, batch_size, schedule, reason)


def check_before_scan(config: Config) -> None:
    """Check what can be checked without the images: the scan may take an hour.

    Raises:
        UserError: An argument of a transform is wrong, or a server of `runtime.data_service` cannot be reached.
    """
    image_augmentation(config.augment, config.variant.resolution, config.data.resize)
    check_servers(config.runtime.data_service or ())


def open_data(config: DataConfig, processes: ProcessGroup) -> DataSource:
    """Open the data set of a config on every process, after the chief, which downloads it if necessary.

    Raises:
        DataError: The data are not available, or their layout is not understood.
    """
    opened: list[DataSource] = []

    def on_the_chief() -> dict[str, bytes]:
        opened.append(open_source(config))
        return {}

    processes.broadcast_from_chief(on_the_chief)
    return opened[0] if opened else open_source(config)


def resolve_on_chief(
    config: Config,
    run: RunDirectory,
    runtime: Runtime,
    source: DataSource,
    model: keras.Model,
    uninitialized_layers: Collection[str],
    console: Console,
    *,
    resume: bool,
) -> tuple[ResolvedConfig, Manifest]:
    """Scan the images and resolve the config on the chief; return the result on every process.

    Args:
        config: The config as written.
        run: Directory of the run, which the chief reads and writes.
        runtime: Devices and precision, from `setup_devices`.
        source: The data set.
        model: The network to train.
        uninitialized_layers: Names of the layers that the weights do not fit.
        console: Console for the summary of the data and the choices.
        resume: Keep the values that the run was started with.

    Raises:
        UserError: The batch cannot be shared, or the data cannot be trained on.
    """
    result: tuple[ResolvedConfig, Manifest] | None = None

    def on_the_chief() -> dict[str, bytes]:
        nonlocal result
        previous = run.load_config() if resume else None
        # The batch comes first: a scan may take an hour.
        with_batch_size, _ = resolve_batch(config, runtime, model, previous=previous)
        manifest = scan_images(source, config.data, config.seed, run, console)
        resolved = resolve(with_batch_size, runtime, model, manifest, uninitialized_layers, previous=previous)
        train, optimizer = resolved.config.train, resolved.config.optimizer
        if config.recipe is not None:
            console.print(describe_recipe(resolved.config))
        if resolved.xla_reason:
            console.print(resolved.xla_reason)
        result = resolved, manifest
        if runtime.processes.world_size == 1:
            return {}
        sections = {"train": train, "optimizer": optimizer, "runtime": resolved.config.runtime}
        values = {name: section.model_dump(mode="json") for name, section in sections.items()}
        return {"sections": json.dumps(values).encode(), "manifest": manifest.to_bytes()}

    received = runtime.processes.broadcast_from_chief(on_the_chief)
    if result is None:
        sections, manifest = json.loads(received["sections"]), Manifest.from_bytes(received["manifest"])
        train = TrainConfig.model_validate(sections["train"])
        optimizer = OptimizerConfig.model_validate(sections["optimizer"])
        config = config.model_copy(update={"train": train, "optimizer": optimizer})
        of_the_chief = config.model_copy(update={"runtime": RuntimeConfig.model_validate(sections["runtime"])})
        result = resolve(config, runtime, model, manifest, previous=of_the_chief), manifest
    return result


def scan_images(source: DataSource, config: DataConfig, seed: int, run: RunDirectory, console: Console) -> Manifest:
    """Scan the data: every image is decoded before any training, by this scan or an earlier one of the same files.

    Args:
        source: The data set.
        config: Section `data` of the config.
        seed: Of the splits.
        run: Directory of the run; the images that cannot be used are listed in it.
        console: Console for the progress and the summary.

    Raises:
        DataError: The data cannot be trained on.
    """
    with console.progress("reading the data") as progress:
        manifest = scan(source, config, seed=seed, progress=progress)
    if manifest.skipped_images:
        manifest.write_skipped_images(run.skipped_images)
    sizes = ", ".join(f"{len(manifest.indices(split)):,} {split}" for split in ("train", "val", "test"))
    console.print(f"data: {plural(len(manifest.class_names), 'class', 'classes')}; images: {sizes}")
    print_notes(manifest, f", listed in {run.skipped_images}", console)
    return manifest


def print_notes(manifest: Manifest, where_listed: str, console: Console) -> None:
    """Print the notes about the data and the number of images that cannot be used.

    Args:
        manifest: All images.
        where_listed: End of the sentence about those that cannot be used: where they are listed.
        console: Console to print to.
    """
    for note in manifest.notes:
        console.print(f"note: {note}")
    if manifest.skipped_images:
        console.print(f"skipped: {plural(len(manifest.skipped_images), 'image')} that cannot be used{where_listed}")

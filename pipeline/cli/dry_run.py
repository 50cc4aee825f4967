"""The dry run of train.py: the resolved config, the data, the stages, and the cost of the model, without training."""

from rich.syntax import Syntax

from pipeline.cli.check import class_table
from pipeline.config.schema import Config
from pipeline.console import Console, command_line, plural
from pipeline.data.manifest import Manifest
from pipeline.data.sources.base import DatasetNotDownloadedError
from pipeline.data.sources.catalog import open_source
from pipeline.data.validation import scan
from pipeline.distributed.devices import setup_devices
from pipeline.models.profile import profile_model
from pipeline.models.weights.sources import PretrainedWeights, WeightsNotDownloadedError
from pipeline.tracking.mlflow_store import check_store, tracking_uri
from pipeline.training.class_weights import class_weights
from pipeline.training.memory import step_memory
from pipeline.training.resolve import ResolvedConfig, check_before_scan, print_notes, resolve, resolve_batch
from pipeline.training.setup import create_model, read_initial_weights


def print_dry_run(config: Config, console: Console) -> None:
    """Print the resolved config, the data, the stages and the cost. Download nothing; write only the scan cache.

    The functions of a training run check the config, the weights, the data and the memory, in the same order.

    Raises:
        UserError: The run itself would raise it, with the same message.
    """
    runtime = setup_devices(config.runtime, config.seed)
    check_before_scan(config)
    missing: DatasetNotDownloadedError | None = None
    try:
        source = open_source(config.data, download=False)
        class_names = source.class_names
    except DatasetNotDownloadedError as error:
        missing, class_names = error, error.class_names
    check_store(tracking_uri(config.tracking.uri), config.tracking.experiment)
    weights: PretrainedWeights | None = None
    try:
        weights = read_initial_weights(config, class_names, console, download=False)
    except WeightsNotDownloadedError as error:
        console.print(f"{error}: training will download it")
    if weights is not None:
        config = config.with_network(weights.adapt(config.variant))
    model, uninitialized_layers = create_model(config, runtime, class_names, console, weights=weights)
    config, (batch_size, accumulation) = resolve_batch(config, runtime, model)

    manifest: Manifest | None = None
    resolved: ResolvedConfig | None = None
    if missing is None:
        with console.progress("reading the data") as progress:
            manifest = scan(source, config.data, seed=config.seed, progress=progress)
        resolved = resolve(config, runtime, model, manifest, uninitialized_layers)
        config, runtime = resolved.config, resolved.runtime
        class_weights(config.train, manifest)
    console.print(Syntax(config.to_yaml(), "yaml", background_color="default"))
    if manifest is None:
        console.print(
            f"{missing}: training will download it. It has {plural(len(class_names), 'class', 'classes')}; "
            "the number of images is known then."
        )
    else:
        print_data(manifest, console)

    variant, profile = config.variant, profile_model(model)
    local_batch_size = batch_size // runtime.replicas // accumulation
    memory = step_memory(config.optimizer, model, local_batch_size, accumulation=accumulation > 1)
    console.print(f"\nEfficientNet-{variant.name} at {variant.resolution} px on {runtime.describe()}")
    console.print(f"  parameters            {profile.parameters:,} ({profile.trainable_parameters:,} trainable)")
    console.print(f"  multiply-adds         {profile.flops / 1e9:.2f} G per image")
    console.print(
        f"  memory for training   about {memory / 2**30:.1f} GiB per device, "
        f"at {plural(local_batch_size, 'image')} per step and device"
    )
    if manifest is not None and resolved is not None:
        print_schedule(resolved, len(manifest.indices("train")), console)


def print_data(manifest: Manifest, console: Console) -> None:
    """Print the images of each class and split, the notes, and the number of images that cannot be used."""
    console.print(class_table(manifest))
    print_notes(manifest, f"; {command_line('check', '--config', 'CONFIG')} lists them", console)


def print_schedule(resolved: ResolvedConfig, num_images: int, console: Console) -> None:
    """Print the choice about XLA, the steps per epoch, and the steps and learning rates of each stage."""
    if resolved.xla_reason:
        console.print(f"  {resolved.xla_reason}")
    console.print(
        f"  steps per epoch       {resolved.schedule.steps_per_epoch:,} "
        f"of {plural(resolved.batch_size.images, 'image')} ({plural(num_images, 'training image')})"
    )
    for number, stage in enumerate(resolved.schedule.stages, 1):
        rates = [stage.learning_rate(step) for step in range(stage.stop - stage.first)]
        console.print(
            f"  stage {number}               {plural(stage.config.epochs, 'epoch')}, "
            f"steps {stage.first + 1:,} to {stage.stop:,}, trains {stage.config.trainable}, "
            f"learning rate {max(rates):.2g} to {rates[-1]:.2g}"
        )

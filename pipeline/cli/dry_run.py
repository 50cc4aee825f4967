"""What a run would be, without running it: the resolved config, the data, the stages, and what the network costs."""

from rich.syntax import Syntax

from pipeline.config.schema import Config
from pipeline.console import Console, python_executable
from pipeline.data.augmentation import image_augmentation
from pipeline.data.input_pipeline import steps_per_epoch
from pipeline.data.manifest import Manifest
from pipeline.data.sources.base import DatasetNotDownloadedError
from pipeline.data.sources.catalog import open_source
from pipeline.data.validation import class_table, scan
from pipeline.distributed.devices import setup_devices
from pipeline.models.efficientnet import efficientnet
from pipeline.models.profile import profile_model
from pipeline.training.memory import check_batch, resolve_batch_size, step_memory
from pipeline.training.recipe import class_weights, resolve_recipe
from pipeline.training.trainer import build_schedule
from pipeline.training.xla import resolve_xla


def print_dry_run(config: Config, screen: Console) -> None:
    """Prints it all. Downloads nothing, and writes nothing but the scan's cache.

    Raises:
        UserError: Where the run itself would, but for its weights, which are not looked at.
    """
    runtime = setup_devices(config)
    image_augmentation(config)
    missing: DatasetNotDownloadedError | None = None
    try:
        source = open_source(config.data, fetch=False)
        class_names = source.class_names
    except DatasetNotDownloadedError as error:
        missing, class_names = error, error.class_names
    model = efficientnet(config.variant, num_classes=len(class_names), dtype=runtime.dtype)
    config = resolve_batch_size(config, runtime, model)
    check_batch(config, runtime)

    manifest: Manifest | None = None
    if missing is None:
        with screen.progress("reading the data") as count:
            manifest = scan(source, config.data, seed=config.seed, progress=count)
        config = resolve_recipe(config, manifest)
        steps = steps_per_epoch(len(manifest.indices("train")), config.train.batch_size)
        config, runtime, reason = resolve_xla(config, runtime, model, build_schedule(config, steps))
        class_weights(config, class_names, manifest.class_counts()["train"].tolist())
    screen.print(Syntax(config.to_yaml(), "yaml", background_color="default"))
    if manifest is None:
        screen.print(
            f"{missing}: training will prepare it. It has {len(class_names)} classes; the number of images is known then."
        )
    else:
        screen.print(class_table(manifest))
        for note in manifest.notes:
            screen.print(f"note: {note}")
        if manifest.left_out:
            screen.print(
                f"left out: {len(manifest.left_out):,} pictures that cannot be used; {python_executable()} -m pipeline check lists them"
            )

    variant, size = config.variant, profile_model(model)
    share = config.train.batch_size // runtime.replicas // config.train.gradient_accumulation_steps
    memory = step_memory(config, model, share, accumulation=config.train.gradient_accumulation_steps > 1)
    screen.print(f"\nEfficientNet-{variant.name} at {variant.resolution} px on {runtime.describe()}")
    screen.print(f"  parameters            {size.parameters:,} ({size.trainable_parameters:,} trainable)")
    screen.print(f"  multiply-adds         {size.flops / 1e9:.2f} G per image")
    screen.print(
        f"  memory for training   about {memory / 2**30:.1f} GiB per device, at {share} images per step and device"
    )
    if manifest is not None:
        images = len(manifest.indices("train"))
        if reason:
            screen.print(f"  {reason}")
        screen.print(
            f"  steps per epoch       {steps:,} of {config.train.batch_size} images ({images:,} training images)"
        )
        for number, stage in enumerate(build_schedule(config, steps), 1):
            rates = [stage.learning_rate(step) for step in range(stage.stop - stage.first)]
            screen.print(
                f"  stage {number}               {stage.config.epochs} epochs, steps {stage.first + 1:,} to {stage.stop:,}, "
                f"trains {stage.config.trainable}, learning rate {max(rates):.2g} to {rates[-1]:.2g}"
            )

"""What a run would be, without running it: the resolved config, the data, the stages, and what the network costs."""

from rich.syntax import Syntax

from pipeline.config.schema import Config
from pipeline.console import Screen, this_python
from pipeline.data.augmentation import image_augmentation
from pipeline.data.input_pipeline import steps_per_epoch
from pipeline.data.manifest import Manifest
from pipeline.data.sources.base import NotFetchedError
from pipeline.data.sources.catalog import open_source
from pipeline.data.validation import class_table, scan
from pipeline.distributed.devices import set_up
from pipeline.models.efficientnet import efficientnet
from pipeline.models.profile import cost
from pipeline.training.memory import check_batch, fit_batch, step_memory
from pipeline.training.recipe import class_weights, settle
from pipeline.training.trainer import plan
from pipeline.training.xla import settle_xla


def show(config: Config, screen: Screen) -> None:
    """Prints it all. Downloads nothing, and writes nothing but the scan's cache.

    Raises:
        UserError: Where the run itself would, but for its weights, which are not looked at.
    """
    runtime = set_up(config)
    image_augmentation(config)
    missing: NotFetchedError | None = None
    try:
        source = open_source(config.data, fetch=False)
        class_names = source.class_names
    except NotFetchedError as error:
        missing, class_names = error, error.class_names
    model = efficientnet(config.variant, num_classes=len(class_names), dtype=runtime.dtype)
    config = fit_batch(config, runtime, model)
    check_batch(config, runtime)

    manifest: Manifest | None = None
    if missing is None:
        with screen.counting("reading the data") as count:
            manifest = scan(source, config.data, seed=config.seed, progress=count)
        config = settle(config, manifest)
        steps = steps_per_epoch(len(manifest.indices("train")), config.train.batch_size)
        config, runtime, reason = settle_xla(config, runtime, model, plan(config, steps))
        class_weights(config, class_names, manifest.class_counts()["train"].tolist())
    screen.say(Syntax(config.to_yaml(), "yaml", background_color="default"))
    if manifest is None:
        screen.say(
            f"{missing}: training will prepare it. It has {len(class_names)} classes; the number of images is known then."
        )
    else:
        screen.say(class_table(manifest))
        for note in manifest.notes:
            screen.say(f"note: {note}")
        if manifest.left_out:
            screen.say(
                f"left out: {len(manifest.left_out):,} pictures that cannot be used; {this_python()} -m pipeline check lists them"
            )

    variant, size = config.variant, cost(model)
    share = config.train.batch_size // runtime.replicas // config.train.accumulation
    memory = step_memory(config, model, share, accumulation=config.train.accumulation > 1)
    screen.say(f"\nEfficientNet-{variant.name} at {variant.resolution} px on {runtime.describe()}")
    screen.say(f"  parameters            {size.parameters:,} ({size.trainable_parameters:,} trainable)")
    screen.say(f"  multiply-adds         {size.flops / 1e9:.2f} G per image")
    screen.say(
        f"  memory for training   about {memory / 2**30:.1f} GiB per device, at {share} images per step and device"
    )
    if manifest is not None:
        images = len(manifest.indices("train"))
        if reason:
            screen.say(f"  {reason}")
        screen.say(
            f"  steps per epoch       {steps:,} of {config.train.batch_size} images ({images:,} training images)"
        )
        for number, stage in enumerate(plan(config, steps), 1):
            rates = [stage.learning_rate(step) for step in range(stage.stop - stage.first)]
            screen.say(
                f"  stage {number}               {stage.config.epochs} epochs, steps {stage.first + 1:,} to {stage.stop:,}, "
                f"trains {stage.config.trainable}, learning rate {max(rates):.2g} to {rates[-1]:.2g}"
            )

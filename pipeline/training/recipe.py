"""The `auto` recipe: an optimizer and stages for fine-tuning, which follow from the data."""

import math
import textwrap
from collections.abc import Collection

import yaml

from pipeline.config.optimizer import OptimizerConfig
from pipeline.config.schema import Config
from pipeline.config.train import StageConfig
from pipeline.data.input_pipeline import steps_per_epoch
from pipeline.data.manifest import Manifest
from pipeline.errors import ConfigError
from pipeline.models.efficientnet import CLASSIFIER_BLOCK, block_of

HEAD_STEPS, MAX_HEAD_EPOCHS = 100, 20
# With 243 images of ants and bees, fine-tuning labeled 94 to 95 % of 153 images correctly, the classifier alone 96 to
# 97 %.
MIN_IMAGES_TO_FINE_TUNE = 500
FINE_TUNING_IMAGES, MIN_EPOCHS, MAX_EPOCHS = 6_000, 5, 20  # images to see while all layers are trained
EMA_FRACTION = 0.15  # share of the steps that the moving average reaches back over
# Fewer steps do not move the statistics of batch normalization to values that are better than ImageNet's.
MIN_STEPS_FOR_STATISTICS = 2_000


def resolve_recipe(
    config: Config,
    manifest: Manifest,
    global_batch_size: int,
    uninitialized_layers: Collection[str] = (),
    *,
    previous: Config | None = None,
) -> Config:
    """Choose what `recipe: auto` leaves open, and check that the data have the split that selects epochs.

    Keys of `optimizer` and `train.stages` that the config has stay as they are, one by one. `train.epochs` are those of
    the last stage, and an `optimizer.base_lr` of the config is its learning rate.

    The first stage trains only the classifier, because a random classifier would pull the pretrained layers off their
    values (arXiv 2202.10054). Its images are not augmented: their features are computed once, so its epochs are cheap.
    From 500 images on, a second stage trains all layers by AdamW with a cosine schedule: for some 6,000 images, within
    5 to 20 epochs, so that small data sets are seen more often. The moving average covers at most the last 15 % of the
    steps (fewer while its decay still rises). Below 2,000 steps batch normalization keeps ImageNet's statistics.

    If the weights do not fit the whole backbone, all layers are trained from the start, including batch normalization,
    whatever the number of images.

    Args:
        config: The config; without a recipe, only `train.epochs` is resolved.
        manifest: All images; the number of training images decides.
        global_batch_size: Images per step over all replicas.
        uninitialized_layers: Names of the layers that the weights do not fit.
        previous: The resolved config of the run that is resumed, if any; its optimizer and stages stay.

    Returns:
        A config with every key of the optimizer and with stages, without `train.epochs`.

    Raises:
        ConfigError: The config selects epochs on the validation split, and there is none.
    """
    if not len(manifest.indices("val")) and (config.train.early_stopping or config.train.restore_best_weights):
        raise ConfigError(
            "train.early_stopping and train.restore_best_weights go by the validation split, and the data have none; "
            "give them one"
        )
    train, given = config.train, config.optimizer.model_dump(exclude_unset=True)
    stages: tuple[StageConfig, ...] = train.stages
    if config.recipe is None:
        if train.epochs is None:
            return config
        stages = (stages[0].model_copy(update={"epochs": train.epochs}),)
        return config.model_copy(update={"train": train.model_copy(update={"epochs": None, "stages": stages})})
    if previous is not None:
        train = train.model_copy(update={"epochs": None, "stages": previous.train.stages})
        return config.model_copy(update={"optimizer": previous.optimizer, "train": train})
    num_images = len(manifest.indices("train"))
    epoch_steps = steps_per_epoch(num_images, global_batch_size)
    head_epochs = min(math.ceil(HEAD_STEPS / epoch_steps), MAX_HEAD_EPOCHS)
    epochs = min(max(round(FINE_TUNING_IMAGES / num_images), MIN_EPOCHS), MAX_EPOCHS)
    partly_fitting = any(block_of(name) < CLASSIFIER_BLOCK for name in uninitialized_layers)
    fine_tuned = num_images >= MIN_IMAGES_TO_FINE_TUNE or partly_fitting
    if "stages" in train.model_fields_set:
        steps = stages[-1].epochs * epoch_steps
    else:
        if fine_tuned:
            epochs = train.epochs or epochs
        else:
            head_epochs = train.epochs or head_epochs
        steps = (epochs if fine_tuned else head_epochs) * epoch_steps
        head_lr = None if "base_lr" in given and not fine_tuned else 0.02
        head = StageConfig(epochs=head_epochs, trainable="head", base_lr=head_lr, use_augmentation=False)
        fine_tuning = StageConfig(
            epochs=epochs, trainable="all", freeze_batch_norm=steps < MIN_STEPS_FOR_STATISTICS and not partly_fitting
        )
        stages = (fine_tuning,) if partly_fitting else (head, fine_tuning) if fine_tuned else (head,)
    chosen = {
        "name": "adamw",
        "base_lr": 0.004,
        "schedule": "cosine",
        "warmup_epochs": 1.0,
        "weight_decay": 1e-4,
        "ema_decay": round(min(max(1 - 1 / (EMA_FRACTION * steps), 0.9), 0.9999), 4),
    }
    # Every key is set, so that the config with its recipe means the same when it is read again.
    optimizer = OptimizerConfig.model_validate(OptimizerConfig.model_validate({**chosen, **given}).model_dump())
    train = train.model_copy(update={"epochs": None, "stages": stages})
    return config.model_copy(update={"optimizer": optimizer, "train": train})


def describe_recipe(config: Config) -> str:
    """Return the resolved keys that `recipe: auto` chose or kept, as lines of a config, without defaults."""
    optimizer = config.optimizer.model_dump(mode="json", exclude_defaults=True)
    stages = [stage.model_dump(mode="json", exclude_defaults=True) for stage in config.train.stages]
    lines = yaml.safe_dump(
        {"optimizer": optimizer, "train": {"stages": stages}}, sort_keys=False, default_flow_style=None, width=76
    )
    return "recipe: auto, which is here\n" + textwrap.indent(lines.rstrip(), "  ")

"""Settings that follow from the data: the `auto` recipe for fine-tuning, and what the images of a class count."""

import math
from collections.abc import Collection, Sequence

import numpy as np

from pipeline.config.optimizer import OptimizerConfig
from pipeline.config.schema import Config
from pipeline.config.train import StageConfig
from pipeline.data.input_pipeline import steps_per_epoch
from pipeline.data.manifest import Manifest
from pipeline.errors import ConfigError, suggest
from pipeline.models.efficientnet import CLASSIFIER_BLOCK, block_of

HEAD_STEPS, MAX_HEAD_EPOCHS = 100, 20
# images: 243 photos of ants and bees got 94 to 95 % of 153 right fine-tuned, 96 to 97 % by the classifier alone
MIN_IMAGES_TO_FINE_TUNE = 500
FINE_TUNING_IMAGES, MIN_EPOCHS, MAX_EPOCHS = 6_000, 5, 20  # while all is fine-tuned
EMA_FRACTION = 0.15  # of the fine-tuning's steps, that the moving average reaches back over
MIN_STEPS_FOR_STATISTICS = (
    2_000  # fewer do not bring batch normalisation's statistics to new values that are better than ImageNet's
)


def resolve_recipe(
    config: Config, manifest: Manifest, uninitialized_layers: Collection[str] = (), *, previous: Config | None = None
) -> Config:
    """Replace `recipe: auto` by what it comes to for these data, and makes sure that they have what the config goes by.

    First the classifier alone, on pictures that are not augmented (their features are computed once, so its epochs are
    cheap), because a random one would pull the pretrained layers off their values (arXiv 2202.10054). Then, from 500
    images on, everything by AdamW with a cosine schedule: for some 6,000 images, within 5 to 20 epochs, so that small
    data sets are seen more often. The average covers at most the last 15 % of the steps (fewer while its decay still
    rises). Below 2,000 steps batch normalisation stays as ImageNet's.

    Where the weights do not fit the whole backbone, everything is trained from the start, batch normalisation too,
    whatever the number.

    Args:
        config: Comes back as it is where `recipe` is null.
        manifest: Its number of training images decides.
        new: Layers that the weights do not fit.
        before: What it came to when a resumed run began, which it keeps to; None at a beginning.

    Returns:
        A config that says all of it and has no recipe.

    Raises:
        ConfigError: If the config goes by a validation split and there is none.
    """
    if not len(manifest.indices("val")) and (config.train.early_stopping or config.train.restore_best_weights):
        raise ConfigError(
            "train.early_stopping and train.restore_best_weights go by the validation split, and the data have none; give them one"
        )
    if config.recipe is None:
        return config
    if previous is not None:
        train = config.train.model_copy(update={"stages": previous.train.stages})
        return config.model_copy(update={"recipe": None, "optimizer": previous.optimizer, "train": train})
    num_images = len(manifest.indices("train"))
    per_epoch = steps_per_epoch(num_images, config.train.batch_size)
    head_epochs = min(math.ceil(HEAD_STEPS / per_epoch), MAX_HEAD_EPOCHS)
    epochs = min(max(round(FINE_TUNING_IMAGES / num_images), MIN_EPOCHS), MAX_EPOCHS)
    patched = any(block_of(name) < CLASSIFIER_BLOCK for name in uninitialized_layers)
    fine_tuned = num_images >= MIN_IMAGES_TO_FINE_TUNE or patched
    steps = (epochs if fine_tuned else head_epochs) * per_epoch
    optimizer = OptimizerConfig(
        name="adamw",
        base_lr=0.004,
        schedule="cosine",
        warmup_epochs=1.0,
        weight_decay=1e-4,
        ema_decay=round(min(max(1 - 1 / (EMA_FRACTION * steps), 0.9), 0.9999), 4),
    )
    head = StageConfig(epochs=head_epochs, trainable="head", base_lr=0.02, use_augmentation=False)
    whole = StageConfig(
        epochs=epochs, trainable="all", freeze_batch_norm=steps < MIN_STEPS_FOR_STATISTICS and not patched
    )
    stages = (whole,) if patched else (head, whole) if fine_tuned else (head,)
    return config.model_copy(
        update={"recipe": None, "optimizer": optimizer, "train": config.train.model_copy(update={"stages": stages})}
    )


def class_weights(config: Config, class_names: Sequence[str], num_images: Sequence[int]) -> np.ndarray | None:
    """How many images an image of each class counts as in the loss; over the training images the mean is 1.

    Args:
        config: `train.class_weights` is used. `balanced` lets every class count the same: N / (K * n_k) for n_k of the
            N images.
        class_names: K names in the order of the labels.
        num_images: Training images of each class, n_k.

    Returns:
        float32 (K,), or None where all count the same.

    Raises:
        ConfigError: If a weight is given for a class that there is not.
    """
    given = config.train.class_weights
    if given is None:
        return None
    counts = np.asarray(num_images, np.float64)
    if given == "balanced":
        weights = 1 / np.maximum(counts, 1)
    else:
        unknown = [name for name in given if name not in class_names]
        if unknown:
            raise ConfigError(
                "\n".join(
                    f"train.class_weights: {name!r} is none of the data's classes{suggest(name, class_names)}"
                    for name in unknown
                )
            )
        weights = np.array([given.get(name, 1.0) for name in class_names])
    return (weights * counts.sum() / (weights * counts).sum()).astype(np.float32)

"""Accuracy on corrupted images: eight of ImageNet-C's kinds of corruption in five severities (arXiv 1903.12261)."""

from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
import tensorflow as tf

from pipeline.config.augment import TransformConfig
from pipeline.data.augmentation import INDEX_BITS, AlbumentationsTransforms
from pipeline.data.preprocessing import PreprocessFn, Resize, resize_to_square

SEVERITIES = (1, 2, 3, 4, 5)
REFERENCE_RESOLUTION = 224  # pixels; the sizes of blurs refer to it
AREA, NEAREST = 3, 0  # OpenCV's interpolations

# By kind, a function that makes the transform, given the severity and a function that scales a length in pixels from
# 224 px to the network's resolution. The strengths are those of the paper's code (hendrycks/robustness,
# make_imagenet_c.py); the transforms are the nearest ones of albumentations: its shot noise works on linear light, its
# brightness on all channels alike.
KINDS: dict[str, Callable[[int, Callable[[float], int]], TransformConfig]] = {
    "gaussian noise": lambda severity, _: _transform(
        "GaussNoise", std_range=_constant_range((0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1])
    ),
    "shot noise": lambda severity, _: _transform(
        "ShotNoise", scale_range=_constant_range(1 / (60, 25, 12, 5, 3)[severity - 1])
    ),
    "defocus blur": lambda severity, px: _transform(
        "Defocus",
        radius=_constant_range(max(1, px((3, 4, 6, 8, 10)[severity - 1]))),
        alias_blur=_constant_range((0.1, 0.5, 0.5, 0.5, 0.5)[severity - 1]),
    ),
    "motion blur": lambda severity, px: _transform(
        "MotionBlur",
        blur_limit=_constant_range(max(3, 2 * px((5, 7, 8, 12, 15)[severity - 1]) + 1)),
        allow_shifted=False,
    ),
    "brightness": lambda severity, _: _transform(
        "RandomBrightnessContrast",
        brightness_limit=_constant_range(0.1 * severity),
        contrast_limit=(0.0, 0.0),
        ensure_safe_range=False,
    ),
    "contrast": lambda severity, _: _transform(
        "ColorJitter",
        brightness=(1.0, 1.0),
        contrast=_constant_range((0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1]),
        saturation=(1.0, 1.0),
        hue=(0.0, 0.0),
    ),
    "pixelate": lambda severity, _: _transform(
        "Downscale",
        scale_range=_constant_range((0.6, 0.5, 0.4, 0.3, 0.25)[severity - 1]),
        interpolation_pair={"downscale": AREA, "upscale": NEAREST},
    ),
    "jpeg compression": lambda severity, _: _transform(
        "ImageCompression", quality_range=_constant_range((25, 18, 15, 10, 7)[severity - 1]), compression_type="jpeg"
    ),
}

NUM_CORRUPTIONS = len(KINDS) * len(SEVERITIES)


def _transform(name: str, **args: Any) -> TransformConfig:
    return TransformConfig(name=name, args={**args, "p": 1.0})


def _constant_range(value: float) -> tuple[float, float]:
    return value, value


def corruption_preprocess_fns(resolution: int, resize: Resize) -> Iterator[tuple[str, int, PreprocessFn]]:
    """Yield a preprocessing function for every kind and severity; an image is corrupted the same way every time.

    Args:
        resolution: Side R of the network's input, in pixels.
        resize: Method of resizing, as in the training run.

    Yields:
        Kind, severity from 1 to 5, and the function for `evaluation_stream`.
    """
    for number, (kind, make) in enumerate(KINDS.items()):
        for severity in SEVERITIES:
            apply = AlbumentationsTransforms(
                [make(severity, lambda size: round(size * resolution / REFERENCE_RESOLUTION))], resolution
            )
            yield kind, severity, _corrupted(apply, number << INDEX_BITS, resolution, resize)


def _corrupted(apply: AlbumentationsTransforms, seed: int, resolution: int, resize: Resize) -> PreprocessFn:
    def preprocess_fn(image: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
        clean = resize_to_square(image, resolution, resize)
        corrupted = tf.numpy_function(apply, [clean, index + seed], tf.uint8, stateful=False)
        return tf.ensure_shape(corrupted, clean.shape)

    return preprocess_fn


def corruption_table(accuracies: dict[tuple[str, int], float]) -> pd.DataFrame:
    """Arrange accuracies by (kind, severity) as a table: a row per kind, a column per severity, and `mean`."""
    table = pd.Series(accuracies).unstack().reindex(list(KINDS))
    return table.assign(mean=table.mean(axis=1)).rename_axis(index="corruption", columns="severity")

"""MixUp (arXiv 1710.09412) and CutMix (arXiv 1905.04899) inside groups of a batch, drawn from (seed, step, group).

Partners are sought inside fixed groups of neighbouring images. A group lies whole inside one replica's micro-batch as
long as that is a multiple of the group, so how the batch is spread over devices does not change what is mixed.
"""

from collections.abc import Callable

import tensorflow as tf

from pipeline.config.schema import Config
from pipeline.errors import ConfigError

GROUP_SIZES = (8, 4, 2)

Mixing = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]


def mixing_group(global_batch_size: int, accumulation: int) -> int:
    """Number of neighbouring images among which partners are sought: the largest of 8, 4 and 2 that divides a micro-batch.

    It does not depend on the number of replicas, so that the data do not. The trainer has to see to it that a replica's
    micro-batch, global_batch_size / accumulation / replicas, is a multiple of it.

    Args:
        global_batch_size: Images per step over all replicas.
        accumulation: Micro-batches per step.

    Returns:
        8, 4 or 2.

    Raises:
        ConfigError: If a micro-batch is odd, so that somebody would be left without a partner.
    """
    micro_batch = global_batch_size // accumulation
    for size in GROUP_SIZES:
        if micro_batch % size == 0:
            return size
    raise ConfigError(
        f"augment.mixup and augment.cutmix need an even number of images per micro-batch; train.global_batch_size / train.gradient_accumulation_steps is "
        f"{global_batch_size} / {accumulation} = {micro_batch}. Make it even, or set mixup and cutmix to 0"
    )


def group_mixing(config: Config) -> Mixing:
    """MixUp, CutMix, or one of the two by chance for each group.

    Every image is mixed with another one of its group, with its own weight: from Beta(alpha, alpha) in MixUp; in CutMix
    the share of pixels that it keeps after a rectangle of area 1 - Beta(alpha, alpha), cut off at the border, came from
    the partner.

    Args:
        config: Its seed, resolution R, `augment.mixup`, `augment.cutmix` and batch sizes are used; at least one alpha
            is above 0.

    Returns:
        A function for a tf.data map: (images: uint8 (group, R, R, 3), labels: float32 (group, K), number: scalar int64,
        the group's, counted from step 0 on) -> the mixed images, uint8, and labels.

    Raises:
        ConfigError: If a micro-batch is odd.
    """
    size = mixing_group(config.train.batch_size, config.train.gradient_accumulation_steps)
    resolution, alpha, cut_alpha = config.variant.resolution, config.augment.mixup, config.augment.cutmix

    def mix(images: tf.Tensor, labels: tf.Tensor, number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        seed = tf.stack([tf.constant(config.seed, tf.int64), number])
        kind, shift, share, place = (tf.random.fold_in(seed, purpose) for purpose in range(4))
        partner = partners(size, shift)
        others = tf.gather(images, partner)

        def mixup() -> tuple[tf.Tensor, tf.Tensor]:
            kept = beta((size,), alpha, share)
            return blend(images, others, kept), kept

        def cutmix() -> tuple[tf.Tensor, tf.Tensor]:
            boxes = random_boxes(resolution, tf.sqrt(1 - beta((size,), cut_alpha, share)), place)
            pasted = [
                paste(image, other, box)
                for image, other, box in zip(*map(tf.unstack, (images, others, boxes)), strict=True)
            ]
            area = tf.reduce_prod(boxes[:, 2:] - boxes[:, :2], axis=1)
            return tf.stack(pasted), 1 - tf.cast(area, tf.float32) / resolution**2

        if alpha and cut_alpha:
            mixed, kept = tf.cond(tf.random.stateless_uniform((), kind) < 0.5, mixup, cutmix)
        else:
            mixed, kept = mixup() if alpha else cutmix()
        weight = kept[:, tf.newaxis]
        return tf.ensure_shape(mixed, images.shape), weight * labels + (1 - weight) * tf.gather(labels, partner)

    return mix


def partners(size: int, seed: tf.Tensor) -> tf.Tensor:
    """Whom each image of a group is mixed with: the one a drawn number of places further, never itself.

    Args:
        size: Images in the group, at least 2.
        seed: int64 (2,).

    Returns:
        int32 (size,): a permutation of the places in the group.
    """
    shift = tf.random.stateless_uniform((), seed, minval=1, maxval=size, dtype=tf.int32)
    return (tf.range(size) + shift) % size


def beta(shape: tuple[int, ...], alpha: float, seed: tf.Tensor) -> tf.Tensor:
    """Draw from Beta(alpha, alpha), as the share of one gamma draw in two; float64, where small alphas do not underflow.

    Args:
        shape: Of the result.
        alpha: Above 0.
        seed: int64 (2,).

    Returns:
        float32 of `shape` in [0, 1].
    """
    first, second = tf.unstack(
        tf.random.stateless_gamma((2, *shape), seed, alpha=tf.constant(alpha, tf.float64), dtype=tf.float64)
    )
    return tf.cast(tf.math.divide_no_nan(first, first + second), tf.float32)


def blend(images: tf.Tensor, others: tf.Tensor, kept: tf.Tensor) -> tf.Tensor:
    """Weighted means of pictures, rounded.

    Args:
        images: uint8 (group, H, W, 3).
        others: uint8 (group, H, W, 3).
        kept: float32 (group,) in [0, 1], the weight of `images`.

    Returns:
        uint8 (group, H, W, 3).
    """
    kept = kept[:, tf.newaxis, tf.newaxis, tf.newaxis]
    mixed = tf.cast(images, tf.float32) * kept + tf.cast(others, tf.float32) * (1 - kept)
    return tf.cast(mixed + 0.5, tf.uint8)  # between 0 and 255 already, so nothing to clip


def random_boxes(resolution: int, sides: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Squares around places anywhere in the picture, cut off at its border.

    Args:
        resolution: Side of the picture, in pixels.
        sides: float32 (group,) in [0, 1], of the squares, as a share of the picture's.
        seed: int64 (2,).

    Returns:
        int32 (group, 4): top, left, bottom, right; bottom and right are not inside.
    """
    centre = tf.random.stateless_uniform((sides.shape[0], 2), seed) * resolution
    half = sides[:, tf.newaxis] * resolution / 2
    return tf.cast(tf.clip_by_value(tf.round(tf.concat([centre - half, centre + half], 1)), 0, resolution), tf.int32)


def paste(image: tf.Tensor, other: tf.Tensor, box: tf.Tensor) -> tf.Tensor:
    """A picture with a box of another one in the same place. Slices are copied; selecting by a mask takes ten times as long.

    Args:
        image: uint8 (H, W, 3).
        other: uint8 (H, W, 3).
        box: int32 (4,): top, left, bottom, right.

    Returns:
        uint8 (H, W, 3).
    """
    top, left, bottom, right = tf.unstack(box)
    middle = tf.concat([image[top:bottom, :left], other[top:bottom, left:right], image[top:bottom, right:]], 1)
    return tf.concat([image[:top], middle, image[bottom:]], 0)

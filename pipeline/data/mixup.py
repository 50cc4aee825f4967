"""MixUp (arXiv 1710.09412) and CutMix (arXiv 1905.04899) inside groups of a batch, drawn from (seed, step, group).

Partners are chosen within fixed groups of consecutive images. A group lies within one replica's micro-batch as long as
the micro-batch is a multiple of the group size, so the number of devices does not change the mixed images.
"""

from collections.abc import Callable

import tensorflow as tf

from pipeline.errors import ConfigError

GROUP_SIZES = (8, 4, 2)

MixFn = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]


def mixing_group_size(global_batch_size: int, accumulation: int) -> int:
    """Return the number of consecutive images that are mixed with each other: the largest of 8, 4, 2 in a micro-batch.

    The size divides a micro-batch. It does not depend on the number of replicas, so the data do not either. The trainer
    must ensure that a replica's micro-batch, global_batch_size / accumulation / replicas, is a multiple of it.

    Args:
        global_batch_size: Images per step over all replicas.
        accumulation: Micro-batches per step.

    Returns:
        8, 4 or 2.

    Raises:
        ConfigError: A micro-batch is odd, so that one image would have no partner.
    """
    micro_batch = global_batch_size // accumulation
    for size in GROUP_SIZES:
        if micro_batch % size == 0:
            return size
    raise ConfigError(
        "augment.mixup and augment.cutmix need an even number of images per micro-batch; "
        "train.global_batch_size / train.gradient_accumulation_steps is "
        f"{global_batch_size} / {accumulation} = {micro_batch}. Make it even, or set mixup and cutmix to 0"
    )


def mixup_and_cutmix(group_size: int, resolution: int, mixup_alpha: float, cutmix_alpha: float, seed: int) -> MixFn:
    """Return a function that applies MixUp, CutMix, or for each group one of the two at random.

    Every image is mixed with another one of its group, with its own weight: from Beta(alpha, alpha) in MixUp; in CutMix
    the share of its pixels that remain after a rectangle of area 1 - Beta(alpha, alpha), cut off at the border, came
    from the partner.

    Args:
        group_size: Images per group, see `mixing_group_size`.
        resolution: Side R of the images, in pixels.
        mixup_alpha: Alpha of MixUp's Beta distribution; 0 turns MixUp off. At least one alpha is above 0.
        cutmix_alpha: Alpha of CutMix's Beta distribution; 0 turns CutMix off.
        seed: Seed of the run.

    Returns:
        A function for a tf.data map: (images: uint8 (group, R, R, 3), labels: float32 (group, K), number: scalar int64,
        number of the group, counted from step 0 on) -> the mixed images, uint8, and labels.
    """

    def mix(images: tf.Tensor, labels: tf.Tensor, number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        group_seed = tf.stack([tf.constant(seed, tf.int64), number])
        method, shift, share, center = (tf.random.fold_in(group_seed, purpose) for purpose in range(4))
        partner = partners(group_size, shift)
        others = tf.gather(images, partner)

        def mixup() -> tuple[tf.Tensor, tf.Tensor]:
            lam = beta((group_size,), mixup_alpha, share)
            return blend(images, others, lam), lam

        def cutmix() -> tuple[tf.Tensor, tf.Tensor]:
            boxes = random_boxes(resolution, tf.sqrt(1 - beta((group_size,), cutmix_alpha, share)), center)
            pasted = [
                paste(image, other, box)
                for image, other, box in zip(*map(tf.unstack, (images, others, boxes)), strict=True)
            ]
            area = tf.reduce_prod(boxes[:, 2:] - boxes[:, :2], axis=1)
            return tf.stack(pasted), 1 - tf.cast(area, tf.float32) / resolution**2

        if mixup_alpha and cutmix_alpha:
            mixed, lam = tf.cond(tf.random.stateless_uniform((), method) < 0.5, mixup, cutmix)
        else:
            mixed, lam = mixup() if mixup_alpha else cutmix()
        weight = lam[:, tf.newaxis]
        return tf.ensure_shape(mixed, images.shape), weight * labels + (1 - weight) * tf.gather(labels, partner)

    return mix


def partners(size: int, seed: tf.Tensor) -> tf.Tensor:
    """Return the partner of each image in a group: the image a drawn number of positions further, never itself.

    Args:
        size: Images in the group, at least 2.
        seed: int64 (2,).

    Returns:
        int32 (size,): a permutation of the positions in the group.
    """
    shift = tf.random.stateless_uniform((), seed, minval=1, maxval=size, dtype=tf.int32)
    return (tf.range(size) + shift) % size


def beta(shape: tuple[int, ...], alpha: float, seed: tf.Tensor) -> tf.Tensor:
    """Draw from Beta(alpha, alpha), as the share of one gamma draw in two.

    The draws are float64, where small alphas do not underflow.

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


def blend(images: tf.Tensor, others: tf.Tensor, lam: tf.Tensor) -> tf.Tensor:
    """Blend images with weights, rounded.

    Args:
        images: uint8 (group, H, W, 3).
        others: uint8 (group, H, W, 3).
        lam: float32 (group,) in [0, 1], the weight of `images`.

    Returns:
        uint8 (group, H, W, 3).
    """
    lam = lam[:, tf.newaxis, tf.newaxis, tf.newaxis]
    mixed = tf.cast(images, tf.float32) * lam + tf.cast(others, tf.float32) * (1 - lam)
    return tf.cast(mixed + 0.5, tf.uint8)  # between 0 and 255 already, so nothing to clip


def random_boxes(resolution: int, sides: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Draw squares around points anywhere in the image, cut off at its border.

    Args:
        resolution: Side of the image, in pixels.
        sides: float32 (group,) in [0, 1], of the squares, as a share of the image's.
        seed: int64 (2,).

    Returns:
        int32 (group, 4): top, left, bottom, right; bottom and right are not inside.
    """
    center = tf.random.stateless_uniform((sides.shape[0], 2), seed) * resolution
    half = sides[:, tf.newaxis] * resolution / 2
    return tf.cast(tf.clip_by_value(tf.round(tf.concat([center - half, center + half], 1)), 0, resolution), tf.int32)


def paste(image: tf.Tensor, other: tf.Tensor, box: tf.Tensor) -> tf.Tensor:
    """Return an image with a box of another image pasted at the same position.

    Slices are copied; selecting by a mask takes ten times as long.

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

"""The stream of batches: a pure function of (manifest, config, global step).

Position g = step * global_batch_size + place in the batch; pass g // n over the n training images in an order of the
pass's own; every image draws its augmentation from (config.seed, pass, its index). Nothing depends on threads, and
starting at a step decodes nothing of what lies before it.
"""

import os

import numpy as np
import tensorflow as tf

from pipeline.config.schema import Config
from pipeline.data.augmentation import Augmentation, decode_whole, image_augmentation
from pipeline.data.index_batch import IndexBatch, memory_mapped_table
from pipeline.data.manifest import Manifest
from pipeline.data.mixup import group_mixing, mixing_group
from pipeline.data.preprocessing import PreprocessFn, decode, resize_to_square
from pipeline.data.randaugment import randaugment
from pipeline.data.sampler import CHUNK_POSITIONS, positions, shuffled
from pipeline.data.sources.base import DataSource
from pipeline.distributed.sharding import FULL_SHARD, Shard
from pipeline.errors import DataError

PREFETCHED = 2  # batches that wait ready; more would only take memory
PASS_BITS = 40  # an image's index takes so many bits of its seed, the pass the others


def steps_per_epoch(num_images: int, global_batch_size: int) -> int:
    """Steps that count as one epoch: whole batches in the images, at least one.

    What is left over is not lost: the next epoch begins with it.

    Args:
        num_images: Training images.
        global_batch_size: Images per step over all replicas.

    Returns:
        At least 1.
    """
    return max(1, num_images // global_batch_size)


def training_stream(
    manifest: Manifest,
    source: DataSource,
    config: Config,
    *,
    start_step: int = 0,
    stride: int = 1,
    augmented: bool = True,
    share: Shard = FULL_SHARD,
    workers: int | None = None,
) -> tf.data.Dataset:
    """Batches for training, without end.

    Args:
        manifest: The samples; those of split train are used.
        source: Where their files come from.
        config: Everything that decides about the pixels, and `runtime.num_workers`, which does not.
        start_step: Steps to leave out, without decoding them.
        stride: 2 gives every second step from there on, 3 every third, without decoding the others.
        augmented: False prepares the pictures as for evaluation, in the same order.
        share: Of each global batch, without reading the rest.
        workers: Images prepared in parallel; None for `runtime.num_workers`. The result does not depend on it.

    Returns:
        An infinite dataset of global batches, or of the share of each: images uint8 (B, R, R, 3) in [0, 255], labels
        float32 (B, K) adding up to 1, weights float32 (B,) of ones, index int64 (B,) into the manifest (under MixUp and
        CutMix, of the image mixed into).

    Raises:
        ConfigError: If the augmentation cannot be built.
        DataError: If the split is empty, or its table cannot be written.
    """
    rows = _rows(manifest, "train")
    batch_size, workers = config.train.batch_size, workers or _workers(config)
    part, count = batch_size // share.count, len(rows)
    look_up, classes, settings = memory_mapped_table(manifest, rows), len(manifest.class_names), config.augment
    augment = image_augmentation(config) if augmented else _unchanged(config)
    randomly = (
        randaugment(settings.randaugment.num_ops, settings.randaugment.magnitude)
        if augmented and settings.randaugment
        else None
    )

    @tf.autograph.experimental.do_not_convert
    def find(position: tf.Tensor) -> tuple[tf.Tensor, IndexBatch]:
        passes, place = shuffled(position, count, config.seed)
        return passes, look_up(place)

    @tf.autograph.experimental.do_not_convert  # it has nothing to convert, and looking for it costs seconds
    def load(passes: tf.Tensor, row: IndexBatch) -> tuple[tf.Tensor, ...]:
        seed = tf.stack([tf.constant(config.seed, tf.int64), tf.bitwise.left_shift(passes, PASS_BITS) + row.index])
        image = augment(source.read_tf(row.key), row.height, row.width, row.orientation, seed)
        if randomly is not None:
            image = randomly(image, seed)
        return image, tf.one_hot(row.label, classes), tf.ones(()), row.index

    dataset = (
        positions(batch_size, share, start_step=start_step, stride=stride)
        .map(find)
        .unbatch()
        .map(load, num_parallel_calls=workers)
    )
    if augmented and (settings.mixup or settings.cutmix):
        size, mix = mixing_group(batch_size, config.train.gradient_accumulation_steps), group_mixing(config)

        def mix_group(number: tf.Tensor, group: tuple[tf.Tensor, ...]) -> tuple[tf.Tensor, ...]:
            images, labels, weights, index = group
            step, place = number // (part // size), number % (part // size)
            before = (start_step + step * stride) * (batch_size // size)  # groups of the steps before, over all shares
            number = before + share.index * (part // size) + place
            return *mix(images, labels, number), weights, index

        dataset = dataset.batch(size, drop_remainder=True).enumerate()
        dataset = dataset.map(mix_group, num_parallel_calls=workers).rebatch(part, drop_remainder=True)
    else:
        dataset = dataset.batch(part, drop_remainder=True)
    dataset = dataset.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))
    return _finish(dataset, workers)


def feature_stream(
    manifest: Manifest, config: Config, features: np.ndarray, *, start_step: int = 0, share: Shard = FULL_SHARD
) -> tf.data.Dataset:
    """The batches of `training_stream` without augmentation, with what a frozen backbone makes of each image in place of the image.

    Args:
        manifest: The samples; those of split train are used.
        config: As of `training_stream`.
        features: float32 (n, C), of the n training images in the manifest's order.
        start_step: Steps to leave out.
        share: Of each global batch.

    Returns:
        An infinite dataset of global batches, or of the share of each: features float32 (B, C), labels float32 (B, K),
        weights float32 (B,), index int64 (B,).
    """
    rows, batch_size = _rows(manifest, "train"), config.train.batch_size
    part, count = batch_size // share.count, len(rows)
    with tf.device("cpu"):
        table, indices = tf.constant(features), tf.constant(rows)
        labels = tf.constant(manifest.table["label"].to_numpy(np.int32)[rows])
    classes = len(manifest.class_names)

    @tf.autograph.experimental.do_not_convert
    def find(position: tf.Tensor) -> tf.Tensor:
        return shuffled(position, count, config.seed)[1]

    @tf.autograph.experimental.do_not_convert
    def load(place: tf.Tensor) -> tuple[tf.Tensor, ...]:
        return (
            tf.gather(table, place),
            tf.one_hot(tf.gather(labels, place), classes),
            tf.ones((part,)),
            tf.gather(indices, place),
        )

    places = positions(batch_size, share, start_step=start_step).map(find).unbatch()
    dataset = places.batch(part, drop_remainder=True).map(load)
    return _finish(
        dataset.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)), _workers(config)
    )


def evaluation_stream(
    manifest: Manifest,
    source: DataSource,
    config: Config,
    split: str,
    *,
    batch_size: int,
    rows: np.ndarray | None = None,
    preprocess_fn: PreprocessFn | None = None,
    share: Shard = FULL_SHARD,
) -> tf.data.Dataset:
    """Batches that hold every image of a split exactly once, in the manifest's order, without augmentation.

    Args:
        manifest: The samples.
        source: Where their files come from.
        config: Its resolution R, `data.resize` and `runtime.num_workers` are used.
        split: train, val or test.
        batch_size: Images per batch, B.
        rows: Only these images of the manifest, int64 (N,), in this order.
        preprocess_fn: Makes of an upright picture, uint8 (H, W, 3), and its index the network's uint8 (R, R, 3); None
            for `fit_square`.
        share: Of each batch, without reading the rest.

    Returns:
        A finite dataset of batches as those of `training_stream`, all of B, or of the share of each. The last is filled
        up with black images of weight 0, index -1 and labels of zeros.

    Raises:
        DataError: If the split is empty, or its table cannot be written.
    """
    rows = _rows(manifest, split) if rows is None else rows
    look_up, classes = memory_mapped_table(manifest, rows), len(manifest.class_names)
    resolution, resize, workers = config.variant.resolution, config.data.resize, _workers(config)
    part, count, batches = batch_size // share.count, len(rows), -(-len(rows) // batch_size)

    @tf.autograph.experimental.do_not_convert
    def find(position: tf.Tensor) -> tuple[tf.Tensor, IndexBatch]:
        return position < count, look_up(tf.minimum(position, count - 1))

    def picture(row: IndexBatch) -> tuple[tf.Tensor, ...]:
        image = decode(source.read_tf(row.key), row.orientation)
        image = (
            resize_to_square(image, resolution, resize) if preprocess_fn is None else preprocess_fn(image, row.index)
        )
        return image, tf.one_hot(row.label, classes), tf.ones(()), row.index

    def nothing() -> tuple[tf.Tensor, ...]:
        return (
            tf.zeros((resolution, resolution, 3), tf.uint8),
            tf.zeros((classes,)),
            tf.zeros(()),
            tf.constant(-1, tf.int64),
        )

    def load(there: tf.Tensor, row: IndexBatch) -> tuple[tf.Tensor, ...]:
        image, label, weight, index = tf.cond(there, lambda: picture(row), nothing)
        return tf.ensure_shape(image, (resolution, resolution, 3)), tf.ensure_shape(label, (classes,)), weight, index

    some = positions(batch_size, share).take(-(-batches * part // CHUNK_POSITIONS))
    dataset = (
        some.map(find)
        .unbatch()
        .take(batches * part)
        .map(load, num_parallel_calls=workers)
        .batch(part, drop_remainder=True)
    )
    return _finish(dataset.apply(tf.data.experimental.assert_cardinality(batches)), workers)


def _unchanged(config: Config) -> Augmentation:
    """What evaluation does to a picture, in the form of an augmentation."""

    def transform(image: tf.Tensor, drawn: tf.Tensor) -> tf.Tensor:
        del drawn
        return resize_to_square(image, config.variant.resolution, config.data.resize)

    return Augmentation(lambda seed: seed, decode_whole, transform)


def _rows(manifest: Manifest, split: str) -> np.ndarray:
    rows = manifest.indices(split)
    if not len(rows):
        raise DataError(f"split {split} holds no images; give it a share in data.splits, or images of its own")
    return rows


def _workers(config: Config) -> int:
    return config.runtime.num_workers or os.cpu_count() or 1


def _finish(dataset: tf.data.Dataset, workers: int) -> tf.data.Dataset:
    options = tf.data.Options()
    options.deterministic = True
    if workers != tf.data.AUTOTUNE:
        options.threading.private_threadpool_size = workers
    options.threading.max_intra_op_parallelism = (
        1  # pictures are prepared side by side; one more level of threads only gets in the way
    )
    # What tf.data rewrites by itself gains nothing here, and to do so it makes a copy of every tensor that a map looks
    # things up in.
    options.experimental_optimization.apply_default_optimizations = False
    options.autotune.enabled = workers == tf.data.AUTOTUNE
    return dataset.prefetch(PREFETCHED).with_options(options)

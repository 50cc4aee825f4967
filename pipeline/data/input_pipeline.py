"""The input pipeline: streams of batches, each a pure function of (manifest, config, global step).

Position g of the stream is step * global_batch_size + index within the batch. With n training images, position g
belongs to epoch g // n, and each epoch has its own order of the images. Every image draws its augmentation from
(config.seed, epoch, index of the image). Nothing depends on threads, and starting at a step decodes no image of the
steps before it.
"""

import os
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from pipeline.config.runtime import RuntimeConfig
from pipeline.config.schema import Config
from pipeline.data.augmentation import INDEX_BITS, Augmentation, decode_full_image, image_augmentation
from pipeline.data.index_table import IndexBatch, memory_mapped_table
from pipeline.data.manifest import Manifest
from pipeline.data.mixup import mixing_group_size, mixup_and_cutmix
from pipeline.data.preprocessing import PreprocessFn, Resize, decode, resize_to_square
from pipeline.data.randaugment import randaugment
from pipeline.data.sampler import CHUNK_POSITIONS, positions, shuffled
from pipeline.data.sources.base import DataSource
from pipeline.data.transcoding import file_reader
from pipeline.distributed.sharding import FULL_SHARD, Shard
from pipeline.errors import DataError
from pipeline.tasks import TASKS

PREFETCH = 2  # batches that wait ready; more would only take memory


def steps_per_epoch(num_images: int, global_batch_size: int) -> int:
    """Return the number of steps that count as one epoch: the full batches in the images, at least one.

    The images that do not fill a batch are not dropped: the next epoch begins with them.

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
    batch_size: int,
    *,
    start_step: int = 0,
    stride: int = 1,
    augmented: bool = True,
    shard: Shard = FULL_SHARD,
    num_workers: int | None = None,
) -> tf.data.Dataset:
    """Return the infinite stream of training batches.

    Args:
        manifest: All images; those of the split train are used.
        source: Source of the image files.
        config: Determines the pixels, and with `runtime.num_workers`, which does not affect them, the threads.
        batch_size: Images per batch over all shards, B.
        start_step: Steps to skip, without decoding their images.
        stride: 2 yields every second step from `start_step` on, 3 every third, without decoding the others.
        augmented: False prepares the images as for evaluation, in the same order.
        shard: Shard of each global batch; the rest of the batch is not read.
        num_workers: Images prepared in parallel; None for `runtime.num_workers`. The result does not depend on it.

    Returns:
        An infinite dataset of global batches, or of the shard of each: images uint8 (B, R, R, 3) in [0, 255], labels
        float32 (B, K) adding up to 1, weights float32 (B,) of ones, index int64 (B,) into the manifest (under MixUp and
        CutMix, the index of the image that keeps its place and is mixed with a partner).

    Raises:
        ConfigError: The augmentation cannot be built.
        DataError: The split is empty, or its table cannot be written.
    """
    indices = _training_indices(manifest)
    num_workers = num_workers or _num_workers(config.runtime)
    local_batch_size, count = batch_size // shard.count, len(indices)
    lookup, num_classes = memory_mapped_table(manifest, indices), len(manifest.class_names)
    read = _file_reader(manifest, source, config, indices)
    settings, resolution, resize = config.augment, config.variant.resolution, config.data.resize
    task = TASKS[config.task]
    augment = (
        image_augmentation(settings, resolution, resize) if augmented else _evaluation_transform(resolution, resize)
    )
    apply_randaugment = (
        randaugment(settings.randaugment.num_ops, settings.randaugment.magnitude)
        if augmented and settings.randaugment
        else None
    )

    @tf.autograph.experimental.do_not_convert
    def find(position: tf.Tensor) -> tuple[tf.Tensor, IndexBatch]:
        epoch, shuffled_position = shuffled(position, count, config.seed)
        return epoch, lookup(shuffled_position)

    @tf.autograph.experimental.do_not_convert  # there is nothing to convert, and searching for it takes seconds
    def load(epoch: tf.Tensor, row: IndexBatch) -> tuple[tf.Tensor, ...]:
        seed = tf.stack([tf.constant(config.seed, tf.int64), tf.bitwise.left_shift(epoch, INDEX_BITS) + row.index])
        image = augment(read(row.key, row.index), row.height, row.width, row.orientation, seed)
        if apply_randaugment is not None:
            image = apply_randaugment(image, seed)
        return image, task.encode(row.label, num_classes), tf.ones(()), row.index

    dataset = (
        positions(batch_size, shard, start_step=start_step, stride=stride)
        .map(find)
        .unbatch()
        .map(load, num_parallel_calls=num_workers)
    )
    if augmented and (settings.mixup or settings.cutmix):
        group_size = mixing_group_size(batch_size, config.train.gradient_accumulation_steps)
        local_groups = local_batch_size // group_size
        mix = mixup_and_cutmix(group_size, resolution, settings.mixup, settings.cutmix, config.seed)

        def mix_group(number: tf.Tensor, group: tuple[tf.Tensor, ...]) -> tuple[tf.Tensor, ...]:
            images, labels, weights, index = group
            step, position = number // local_groups, number % local_groups
            previous_groups = (start_step + step * stride) * (batch_size // group_size)  # of all shards
            number = previous_groups + shard.index * local_groups + position
            return *mix(images, labels, number), weights, index

        dataset = dataset.batch(group_size, drop_remainder=True).enumerate()
        dataset = dataset.map(mix_group, num_parallel_calls=num_workers).rebatch(local_batch_size, drop_remainder=True)
    else:
        dataset = dataset.batch(local_batch_size, drop_remainder=True)
    dataset = dataset.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))
    return _with_options(dataset, num_workers)


def feature_stream(
    manifest: Manifest,
    config: Config,
    batch_size: int,
    features: np.ndarray,
    *,
    start_step: int,
    shard: Shard,
) -> tf.data.Dataset:
    """Return the batches of `training_stream` without augmentation, with a frozen backbone's features as the images.

    Args:
        manifest: All images; those of the split train are used.
        config: See `training_stream`.
        batch_size: Images per batch over all shards, B.
        features: float32 (n, C), features of the n training images in the manifest's order.
        start_step: Steps to skip.
        shard: Shard of each global batch.

    Returns:
        An infinite dataset of global batches, or of the shard of each: features float32 (B, C), labels float32 (B, K),
        weights float32 (B,), index int64 (B,).
    """
    rows = _training_indices(manifest)
    local_batch_size, count = batch_size // shard.count, len(rows)
    with tf.device("cpu"):
        table, indices = tf.constant(features), tf.constant(rows)
        labels = tf.constant(manifest.table["label"].to_numpy(np.int32)[rows])
    task, num_classes = TASKS[config.task], len(manifest.class_names)

    @tf.autograph.experimental.do_not_convert
    def find(position: tf.Tensor) -> tf.Tensor:
        return shuffled(position, count, config.seed)[1]

    @tf.autograph.experimental.do_not_convert
    def load(position: tf.Tensor) -> tuple[tf.Tensor, ...]:
        return (
            tf.gather(table, position),
            task.encode(tf.gather(labels, position), num_classes),
            tf.ones((local_batch_size,)),
            tf.gather(indices, position),
        )

    shuffled_positions = positions(batch_size, shard, start_step=start_step).map(find).unbatch()
    dataset = shuffled_positions.batch(local_batch_size, drop_remainder=True).map(load)
    return _with_options(
        dataset.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)),
        _num_workers(config.runtime),
    )


def evaluation_stream(
    manifest: Manifest,
    source: DataSource,
    config: Config,
    indices: np.ndarray,
    *,
    batch_size: int,
    preprocess_fn: PreprocessFn | None = None,
    shard: Shard = FULL_SHARD,
) -> tf.data.Dataset:
    """Return batches that hold each of some images exactly once, in the given order, without augmentation.

    Args:
        manifest: All images.
        source: Source of the image files.
        config: Its resolution R, `data.resize`, `data.background` and `runtime.num_workers` are used.
        indices: Indices of the images in the manifest, int64 (N,), such as `manifest.indices(split)`.
        batch_size: Images per batch, B.
        preprocess_fn: Maps an upright image, uint8 (H, W, 3), and its index to the network's input, uint8 (R, R, 3);
            None for `resize_to_square`.
        shard: Shard of each batch; the rest of the batch is not read.

    Returns:
        A finite dataset of batches like those of `training_stream`, all of size B, or of the shard of each. The last
        batch is padded with black images of weight 0, index -1 and labels of zeros.

    Raises:
        DataError: There are no images, or their table cannot be written.
    """
    if not len(indices):
        raise DataError("the split holds no images; give it a share in data.splits, or images of its own")
    lookup, num_classes = memory_mapped_table(manifest, indices), len(manifest.class_names)
    read = _file_reader(manifest, source, config, indices)
    resolution, resize, num_workers = config.variant.resolution, config.data.resize, _num_workers(config.runtime)
    local_batch_size, count, batches = batch_size // shard.count, len(indices), -(-len(indices) // batch_size)
    task, shape = TASKS[config.task], (resolution, resolution, config.model.channels)

    @tf.autograph.experimental.do_not_convert
    def find(position: tf.Tensor) -> tuple[tf.Tensor, IndexBatch]:
        return position < count, lookup(tf.minimum(position, count - 1))

    def load_image(row: IndexBatch) -> tuple[tf.Tensor, ...]:
        image = decode(read(row.key, row.index), row.orientation)
        image = (
            resize_to_square(image, resolution, resize) if preprocess_fn is None else preprocess_fn(image, row.index)
        )
        return image, task.encode(row.label, num_classes), tf.ones(()), row.index

    def padding() -> tuple[tf.Tensor, ...]:
        return (
            tf.zeros(shape, tf.uint8),
            tf.zeros((num_classes,)),
            tf.zeros(()),
            tf.constant(-1, tf.int64),
        )

    def load(exists: tf.Tensor, row: IndexBatch) -> tuple[tf.Tensor, ...]:
        image, label, weight, index = tf.cond(exists, lambda: load_image(row), padding)
        return (
            tf.ensure_shape(image, shape),
            tf.ensure_shape(label, (num_classes,)),
            weight,
            index,
        )

    chunks = positions(batch_size, shard).take(-(-batches * local_batch_size // CHUNK_POSITIONS))
    dataset = (
        chunks.map(find)
        .unbatch()
        .take(batches * local_batch_size)
        .map(load, num_parallel_calls=num_workers)
        .batch(local_batch_size, drop_remainder=True)
    )
    return _with_options(dataset.apply(tf.data.experimental.assert_cardinality(batches)), num_workers)


def _file_reader(
    manifest: Manifest, source: DataSource, config: Config, indices: np.ndarray
) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """Return the function that reads the files of some images; see `transcoding.file_reader`."""
    needed = np.zeros(len(manifest.table), bool)
    needed[indices] = manifest.transcoded[indices]
    return file_reader(source, needed, config.data.background)


def _evaluation_transform(resolution: int, resize: Resize) -> Augmentation:
    """Return the evaluation preprocessing in the form of an augmentation."""

    def transform(image: tf.Tensor, drawn: tf.Tensor) -> tf.Tensor:
        del drawn
        return resize_to_square(image, resolution, resize)

    return Augmentation(lambda seed: seed, decode_full_image, transform)


def _training_indices(manifest: Manifest) -> np.ndarray:
    indices = manifest.indices("train")
    if not len(indices):
        raise DataError("split train holds no images; give it a share in data.splits, or images of its own")
    return indices


def _num_workers(runtime: RuntimeConfig) -> int:
    return runtime.num_workers or os.cpu_count() or 1


def _with_options(dataset: tf.data.Dataset, num_workers: int) -> tf.data.Dataset:
    options = tf.data.Options()
    options.deterministic = True
    if num_workers != tf.data.AUTOTUNE:
        options.threading.private_threadpool_size = num_workers
    # Images are prepared in parallel; more threads within an operation would only compete with them.
    options.threading.max_intra_op_parallelism = 1
    # tf.data's own graph rewrites gain nothing here, and they copy every tensor that a map captures.
    options.experimental_optimization.apply_default_optimizations = False
    options.autotune.enabled = num_workers == tf.data.AUTOTUNE
    return dataset.prefetch(PREFETCH).with_options(options)

"""The order of the images: a function of the position in the stream, so memory does not grow with the data set.

The order of an epoch, that is one pass over all n images, is a swap-or-not shuffle (Hoang, Morris, Rogaway: An
Enciphering Scheme Based on a Card Shuffle, 2012). Each round takes a number k below n from the key and pairs every
position x with (k - x) mod n. One bit, which is the same for both positions, decides whether the pair is swapped. A
position is followed through all rounds without computing any other position.
"""

import tensorflow as tf

from pipeline.distributed.sharding import Shard

SHUFFLE_ALGORITHM = "swap-or-not shuffle"  # a resumed run must use the same
CHUNK_POSITIONS = 1024  # positions
ROUNDS_PER_BIT = 6  # of n, as the paper has it
SPLITMIX_INCREMENT = 0x9E3779B97F4A7C15  # of the golden ratio, the increment of SplitMix64
SPLITMIX_FIRST, SPLITMIX_SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # its multipliers


def positions(batch_size: int, shard: Shard, *, start_step: int = 0, stride: int = 1) -> tf.data.Dataset:
    """Return the positions of a shard, from a step on.

    Args:
        batch_size: Size of the global batch; step s holds the positions from s * batch_size on.
        shard: Shard of each batch.
        start_step: First step.
        stride: 2 yields every second step from `start_step` on.

    Returns:
        An infinite dataset of int64 (CHUNK_POSITIONS,).
    """
    local_batch_size = batch_size // shard.count

    @tf.autograph.experimental.do_not_convert  # there is nothing to convert
    def chunk(number: tf.Tensor) -> tf.Tensor:
        offset = number * CHUNK_POSITIONS + tf.range(CHUNK_POSITIONS, dtype=tf.int64)
        step = start_step + offset // local_batch_size * stride
        return step * batch_size + shard.index * local_batch_size + offset % local_batch_size

    return tf.data.Dataset.range(tf.int64.max).map(chunk)


def shuffled(position: tf.Tensor, count: int, seed: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the epoch and the image at positions of the stream; each epoch has its own order.

    Args:
        position: int64 (N,), from 0.
        count: Number of images, at least 1.
        seed: Seed of the run.

    Returns:
        The epoch and the image, int64 (N,) each; every image comes once in an epoch.
    """
    epoch, n = position // count, tf.constant(count, tf.uint64)
    key = _splitmix64(
        _splitmix64(tf.fill(tf.shape(position), tf.constant(seed % 2**64, tf.uint64))) + tf.cast(epoch, tf.uint64)
    )

    def swap(number: tf.Tensor, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        drawn = _splitmix64(key + tf.cast(number, tf.uint64) * SPLITMIX_INCREMENT)
        partner = (drawn % n + n - index) % n
        bit = tf.bitwise.right_shift(_splitmix64(drawn + tf.maximum(index, partner)), tf.constant(63, tf.uint64))
        return number + 1, tf.where(tf.cast(bit, tf.bool), partner, index)

    rounds = ROUNDS_PER_BIT * count.bit_length()
    _, index = tf.while_loop(
        lambda number, _: number <= rounds, swap, (1, tf.cast(position % count, tf.uint64)), parallel_iterations=1
    )
    return epoch, tf.cast(index, tf.int64)


def _splitmix64(value: tf.Tensor) -> tf.Tensor:
    """Apply the finalizer of SplitMix64 to uint64 values.

    Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014.
    """
    for shift, factor in ((30, SPLITMIX_FIRST), (27, SPLITMIX_SECOND)):
        value = tf.bitwise.bitwise_xor(
            value, tf.bitwise.right_shift(value, tf.constant(shift, tf.uint64))
        ) * tf.constant(factor, tf.uint64)
    return tf.bitwise.bitwise_xor(value, tf.bitwise.right_shift(value, tf.constant(31, tf.uint64)))

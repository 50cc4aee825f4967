"""Which image comes when: a function of the position in the stream, so that nothing grows with the number of images.

The order of a pass is a swap-or-not shuffle (Hoang, Morris, Rogaway: An Enciphering Scheme Based on a Card Shuffle,
2012). Each round takes a number k below n from the key, pairs every place x with (k - x) mod n, and swaps the pair or
not by one bit that both of its places agree on. Any place is followed through all rounds without those of the others.
"""

import tensorflow as tf

from pipeline.distributed.sharding import FULL_SHARD, Shard

ORDER = "swap-or-not shuffle"  # part of what a resumed run must agree with
CHUNK_POSITIONS = 1024  # positions
ROUNDS_PER_BIT = 6  # of n, as the paper has it
SPLITMIX_INCREMENT = 0x9E3779B97F4A7C15  # of the golden ratio, the increment of SplitMix64
SPLITMIX_FIRST, SPLITMIX_SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # its multipliers


def positions(batch_size: int, share: Shard = FULL_SHARD, *, start_step: int = 0, stride: int = 1) -> tf.data.Dataset:
    """The positions of a share, from a step on.

    Args:
        batch_size: Of the global batch: step s holds the positions from s * batch_size on.
        share: Of each batch.
        start_step: The first.
        stride: 2 gives every second step from there on.

    Returns:
        An infinite dataset of int64 (AT_ONCE,).
    """
    part = batch_size // share.count

    @tf.autograph.experimental.do_not_convert  # there is nothing to convert
    def some(number: tf.Tensor) -> tf.Tensor:
        own = number * CHUNK_POSITIONS + tf.range(CHUNK_POSITIONS, dtype=tf.int64)
        return (start_step + own // part * stride) * batch_size + share.index * part + own % part

    return tf.data.Dataset.range(tf.int64.max).map(some)


def shuffled(position: tf.Tensor, count: int, seed: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Go through `count` images pass after pass, each in an order of its own.

    Args:
        position: int64 (N,), from 0.
        count: Images, at least 1.
        seed: Of the run.

    Returns:
        The pass and the image, int64 (N,) each; every image comes once in a pass.
    """
    passes, n = position // count, tf.constant(count, tf.uint64)
    key = _mixed(_mixed(tf.fill(tf.shape(position), tf.constant(seed % 2**64, tf.uint64))) + tf.cast(passes, tf.uint64))

    def swap(number: tf.Tensor, place: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        drawn = _mixed(key + tf.cast(number, tf.uint64) * SPLITMIX_INCREMENT)
        partner = (drawn % n + n - place) % n
        bit = tf.bitwise.right_shift(_mixed(drawn + tf.maximum(place, partner)), tf.constant(63, tf.uint64))
        return number + 1, tf.where(tf.cast(bit, tf.bool), partner, place)

    rounds = ROUNDS_PER_BIT * count.bit_length()
    _, place = tf.while_loop(
        lambda number, _: number <= rounds, swap, (1, tf.cast(position % count, tf.uint64)), parallel_iterations=1
    )
    return passes, tf.cast(place, tf.int64)


def _mixed(value: tf.Tensor) -> tf.Tensor:
    """The finalizer of SplitMix64 (Steele, Lea, Flood.

    Fast Splittable Pseudorandom Number Generators, 2014), uint64.
    """
    for shift, factor in ((30, SPLITMIX_FIRST), (27, SPLITMIX_SECOND)):
        value = tf.bitwise.bitwise_xor(
            value, tf.bitwise.right_shift(value, tf.constant(shift, tf.uint64))
        ) * tf.constant(factor, tf.uint64)
    return tf.bitwise.bitwise_xor(value, tf.bitwise.right_shift(value, tf.constant(31, tf.uint64)))

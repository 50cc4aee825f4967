"""Shards of a global batch: the part of each process, and of each replica within a process."""

from dataclasses import dataclass
from typing import Any

import tensorflow as tf


@dataclass(frozen=True)
class Shard:
    """The contiguous part of every batch that one of several processes takes. All shards have the same size.

    Attributes:
        index: Index of the process, from 0.
        count: Number of processes, a divisor of the batch size.
    """

    index: int = 0
    count: int = 1


FULL_SHARD = Shard()


def local_replicas(strategy: tf.distribute.Strategy) -> int:
    """Return the number of a strategy's replicas in this process."""
    return len(strategy.extended.worker_devices)


def on_replicas(dataset: tf.data.Dataset, strategy: tf.distribute.Strategy) -> Any:
    """Distribute batches over the replicas of this process; each gets a contiguous part of every batch.

    Args:
        dataset: Batches that all have the same size.
        strategy: A strategy with several replicas.

    Returns:
        An iterable of the batches' per-replica values.
    """
    part = dataset.element_spec[0].shape[0] // local_replicas(strategy)
    parts = dataset.rebatch(part, drop_remainder=True)
    if dataset.cardinality() == tf.data.INFINITE_CARDINALITY:
        # rebatch forgets the cardinality; without it the processes would ask each other at every step.
        parts = parts.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))
    return strategy.distribute_datasets_from_function(lambda context: parts)

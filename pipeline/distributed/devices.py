"""The machine that a run uses: devices, precision, compilation and seeds."""

import ctypes
import os
import platform
import random
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from pipeline.config.schema import Config
from pipeline.distributed.cluster import ProcessInfo
from pipeline.distributed.process_group import ProcessGroup

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@dataclass(frozen=True)
class Shard:
    """The part of every batch that one of several processes takes: a contiguous one, all of the same size.

    Attributes:
        number: Of the process, from 0.
        of: Number of processes, a divisor of the batch.
    """

    index: int = 0
    count: int = 1


FULL_SHARD = Shard()


@dataclass(frozen=True)
class Runtime:
    """How the steps of a run are carried out.

    Attributes:
        strategy: TensorFlow's distribution strategy; the default one on a single device.
        dtype: Keras's dtype policy of the network, `float32` or `mixed_bfloat16`.
        jit_compile: Whether the step is compiled by XLA; None until `settle_xla` has weighed that.
        processes: Those of the run; this one alone but on several machines.
        sync_batch_norm: Whether batch normalisation takes its statistics over all replicas; False where there is one.
    """

    strategy: tf.distribute.Strategy
    dtype: str
    jit_compile: bool | None
    processes: ProcessGroup = field(default_factory=ProcessGroup)
    sync_batch_norm: bool = False

    @property
    def replicas(self) -> int:
        """Copies of the network that a global batch is shared among, over all processes."""
        return self.strategy.num_replicas_in_sync

    @property
    def share(self) -> Shard:
        """What of a global batch the replicas of this process take."""
        return Shard(self.processes.rank, self.processes.world_size)

    @property
    def on_one_gpu(self) -> bool:
        """Where it depends on the run whether XLA is worth its compilation."""
        return self.replicas == 1 and bool(tf.config.list_logical_devices("GPU"))

    def feed(self, dataset: tf.data.Dataset) -> Iterable[Any]:
        """Brings batches, this process's share of each, to the devices ahead of their use; every replica gets a contiguous part of it."""
        if self.replicas > 1:
            return on_replicas(dataset, self.strategy)
        if tf.config.list_logical_devices("GPU"):
            return dataset.apply(tf.data.experimental.prefetch_to_device("/gpu:0", buffer_size=2))
        return dataset

    def whole_batch(self, size: int) -> int:
        """The number of images at or above `size` that the replicas can share evenly."""
        return -(-size // self.replicas) * self.replicas

    def describe(self) -> str:
        """One line for the screen: devices, precision, compilation."""
        kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
        devices = f"{self.replicas} {kind}s, mirrored" if self.replicas > 1 else f"one {kind}"
        if self.processes.world_size > 1:
            devices += f" over {self.processes.world_size} processes of {len(self.strategy.extended.worker_devices)}"
        compiled = {True: "on", False: "off", None: "to be weighed"}[self.jit_compile]
        return f"{devices}, {'bfloat16' if self.dtype == 'mixed_bfloat16' else self.dtype}, XLA {compiled}"


def setup_devices(config: Config, place: ProcessInfo | None = None) -> Runtime:
    """Seeds every generator and settles devices, precision and compilation.

    Args:
        config: Its seed and `runtime` are used.
        place: Of this process among those of the run, which it waits for; None for a run of this process alone.
    """
    # Connecting comes first: TensorFlow wants it before it has looked at a device.
    several = None if place is None else tf.distribute.MultiWorkerMirroredStrategy()
    random.seed(config.seed)
    np.random.seed(config.seed)
    keras.utils.set_random_seed(config.seed)
    gpus = tf.config.list_logical_devices("GPU")
    devices = gpus or tf.config.list_logical_devices("CPU")
    if not gpus:
        _keep_freed_memory()
    choice = config.runtime.strategy
    mirrored = choice == "mirrored" or (choice in ("auto", "multi_worker") and len(gpus) > 1)
    if several is not None:
        strategy: tf.distribute.Strategy = several
    else:
        strategy = (
            tf.distribute.MirroredStrategy([device.name for device in devices])
            if mirrored
            else tf.distribute.get_strategy()
        )
    xla, synchronised = config.runtime.xla, config.runtime.sync_batch_norm and strategy.num_replicas_in_sync > 1
    runtime = Runtime(
        strategy, _dtype(config.runtime.precision), xla is True, ProcessGroup(place, several), synchronised
    )
    # auto: measured to be slower on CPUs; failing on several logical CPU devices
    return replace(runtime, jit_compile=None) if xla == "auto" and runtime.on_one_gpu else runtime


def _keep_freed_memory() -> None:
    """Has the C library keep what one step frees for the next.

    glibc gives blocks of more than 32 MB, which activations are, back to the system at once, and the system clears them each time they are
    taken anew: a third of a step's processor time. Measured for lite0 at 224 pixels, 32 images, two CPU cores: 6 steps took 24.6 s in the
    program and 12.2 s in the system; with this 26.0 and 5.7 s, and 3.6 instead of 3.0 GB at the peak.
    """
    with suppress(OSError, AttributeError):  # another C library has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def on_replicas(dataset: tf.data.Dataset, strategy: tf.distribute.Strategy) -> Any:
    """Brings batches to the replicas of this process, each getting a contiguous part of every batch.

    Args:
        dataset: Of batches that are all of one size.
        strategy: Of several replicas.

    Returns:
        An iterable of the batches' per-replica values.
    """
    part = dataset.element_spec[0].shape[0] // len(strategy.extended.worker_devices)
    parts = dataset.rebatch(part, drop_remainder=True)
    if (
        dataset.cardinality() == tf.data.INFINITE_CARDINALITY
    ):  # which rebatch forgets; the processes would ask each other at every step
        parts = parts.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))
    return strategy.distribute_datasets_from_function(lambda context: parts)


def _dtype(precision: str) -> str:
    if precision == "auto":
        gpus = tf.config.list_physical_devices("GPU")
        capabilities = [
            tf.config.experimental.get_device_details(gpu).get("compute_capability", (0, 0)) for gpu in gpus
        ]
        precision = "bfloat16" if capabilities and min(capabilities) >= (8, 0) else "float32"
    return "mixed_bfloat16" if precision == "bfloat16" else "float32"


def processor() -> str:
    """What the machine computes with, for the record beside a time: the GPU's name, or the CPU's with the number of its cores."""
    for gpu in tf.config.get_visible_devices("GPU"):
        return str(tf.config.experimental.get_device_details(gpu).get("device_name", "GPU"))
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else []
    return f"{names[0] if names else platform.machine()} ({len(os.sched_getaffinity(0))} logical cores)"

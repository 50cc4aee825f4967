"""The machine that a run uses: devices, precision, compilation and seeds."""

import ctypes
import os
import platform
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from tensorflow.python.client import device_lib

from pipeline.config.runtime import RuntimeConfig
from pipeline.console import plural, python_executable
from pipeline.distributed.cluster import ProcessInfo
from pipeline.distributed.process_group import ProcessGroup
from pipeline.distributed.sharding import Shard, local_replicas, on_replicas

NVIDIA_DRIVER = Path("/proc/driver/nvidia")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h


@dataclass(frozen=True)
class Runtime:
    """The devices, the precision and the compilation that the steps of a run use.

    Attributes:
        strategy: TensorFlow's distribution strategy; the default one on a single device.
        dtype: Keras's dtype policy of the network, `float32` or `mixed_bfloat16`.
        jit_compile: True if XLA compiles the step; None until `resolve_xla` decides it.
        processes: The processes of the run; only this one unless the run spans several machines.
        sync_batch_norm: True if batch normalization takes its statistics over all replicas; False with one replica.
    """

    strategy: tf.distribute.Strategy
    dtype: str
    jit_compile: bool | None
    processes: ProcessGroup = field(default_factory=ProcessGroup)
    sync_batch_norm: bool = False

    @property
    def replicas(self) -> int:
        """Number of copies of the network that share a global batch, over all processes."""
        return self.strategy.num_replicas_in_sync

    @property
    def shard(self) -> Shard:
        """The shard of a global batch that the replicas of this process take."""
        return Shard(self.processes.rank, self.processes.world_size)

    @property
    def on_one_gpu(self) -> bool:
        """True on a single GPU, where it depends on the run whether XLA repays its compilation."""
        return self.replicas == 1 and bool(tf.config.list_logical_devices("GPU"))

    def feed(self, dataset: tf.data.Dataset) -> Iterable[Any]:
        """Bring batches to the devices ahead of their use.

        Args:
            dataset: This process's shard of each batch. Every replica gets a contiguous part of it.
        """
        if self.replicas > 1:
            return on_replicas(dataset, self.strategy)
        if tf.config.list_logical_devices("GPU"):
            return dataset.apply(tf.data.experimental.prefetch_to_device("/gpu:0", buffer_size=2))
        return dataset

    def round_up_to_replicas(self, size: int) -> int:
        """Return the smallest number of images at or above `size` that the replicas can share evenly."""
        return -(-size // self.replicas) * self.replicas

    def describe(self) -> str:
        """Return one line for the console: devices, precision, compilation."""
        kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
        devices = f"{self.replicas} {kind}s, mirrored" if self.replicas > 1 else f"one {kind}"
        if self.processes.world_size > 1:
            devices += f" over {self.processes.world_size} processes of {local_replicas(self.strategy)}"
        compiled = {True: "on", False: "off", None: "not decided yet"}[self.jit_compile]
        return f"{devices}, {'bfloat16' if self.dtype == 'mixed_bfloat16' else self.dtype}, XLA {compiled}"


def setup_devices(config: RuntimeConfig, seed: int, process_info: ProcessInfo | None = None) -> Runtime:
    """Seed every random generator and choose devices, precision and compilation.

    Args:
        config: The section `runtime` of the config.
        seed: Seed of Python's, NumPy's and TensorFlow's generators.
        process_info: This process among those of the run, which it waits for; None for a run of one process.
    """
    # Connecting comes first: TensorFlow wants it before it has looked at a device.
    multi_worker = None if process_info is None else tf.distribute.MultiWorkerMirroredStrategy()
    keras.utils.set_random_seed(seed)
    gpus = tf.config.list_logical_devices("GPU")
    if not gpus:
        _keep_freed_memory()
    strategy = _single_process_strategy(config.strategy, gpus) if multi_worker is None else multi_worker
    runtime = Runtime(
        strategy,
        _dtype_policy(config.precision),
        config.xla is True,
        ProcessGroup(process_info, multi_worker),
        config.sync_batch_norm and strategy.num_replicas_in_sync > 1,
    )
    # XLA was measured to be slower on CPUs, and it fails on several logical CPU devices.
    return replace(runtime, jit_compile=None) if config.xla == "auto" and runtime.on_one_gpu else runtime


def unusable_gpu(driver: Path = NVIDIA_DRIVER) -> str | None:
    """Return a sentence about an NVIDIA GPU that TensorFlow cannot use, with the remedy; None if there is none.

    Args:
        driver: Folder of the NVIDIA driver, which has an entry for each GPU in `gpus`.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    folder = driver / "gpus"
    gpus = len(list(folder.iterdir())) if folder.is_dir() else 0
    if hidden or not gpus or tf.config.list_physical_devices("GPU"):
        return None
    found = f"this machine has {plural(gpus, 'NVIDIA GPU')}, but TensorFlow {tf.__version__} cannot use it"
    if not tf.test.is_built_with_cuda():
        return f"{found}: it is built without CUDA; install the package tensorflow in place of tensorflow-cpu"
    return (
        f"{found}, so the CPU trains: install CUDA's libraries by `make setup GPU=1` or "
        f"`{python_executable()} -m pip install --constraint constraints.txt 'tensorflow[and-cuda]'`; if they are "
        "installed, the driver may be too old for them, see the log and nvidia-smi"
    )


def _single_process_strategy(name: str, gpus: list[tf.config.LogicalDevice]) -> tf.distribute.Strategy:
    """Return the strategy for one process; `name` is that of `runtime.strategy`."""
    if name == "mirrored" or (name in ("auto", "multi_worker") and len(gpus) > 1):
        devices = gpus or tf.config.list_logical_devices("CPU")
        return tf.distribute.MirroredStrategy([device.name for device in devices])
    return tf.distribute.get_strategy()


def _keep_freed_memory() -> None:
    """Make the C library keep the memory that one step frees for the next step.

    Activations are blocks of more than 32 MB. glibc returns such blocks to the system at once, and the system clears
    them each time they are allocated again: a third of a step's processor time. Measured for lite0 at 224 pixels, 32
    images, two CPU cores: 6 steps took 24.6 s in the program and 12.2 s in the system; with this setting 26.0 and
    5.7 s, and 3.6 instead of 3.0 GB at the peak.
    """
    with suppress(OSError, AttributeError):  # another C library has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _dtype_policy(precision: str) -> str:
    """Return Keras's dtype policy for `runtime.precision`."""
    if precision == "auto":
        gpus = tf.config.list_physical_devices("GPU")
        capabilities = [
            tf.config.experimental.get_device_details(gpu).get("compute_capability", (0, 0)) for gpu in gpus
        ]
        precision = "bfloat16" if capabilities and min(capabilities) >= (8, 0) else "float32"
    return "mixed_bfloat16" if precision == "bfloat16" else "float32"


def processor_name() -> str:
    """Return the name of the first GPU, or of the CPU with its number of cores, for the record of a measurement."""
    for gpu in tf.config.get_visible_devices("GPU"):
        return str(tf.config.experimental.get_device_details(gpu).get("device_name", "GPU"))
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else []
    return f"{names[0] if names else platform.machine()} ({len(os.sched_getaffinity(0))} logical cores)"


def gpu_memory_limits() -> list[int]:
    """Return the bytes that TensorFlow may allocate on each GPU.

    `device_lib` is a private module. TensorFlow's public API tells the current and the peak use, but not this limit.
    """
    return [device.memory_limit for device in device_lib.list_local_devices() if device.device_type == "GPU"]

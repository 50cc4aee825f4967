"""The number of images that a device can take in one step, by estimate.

It serves `global_batch_size: auto`, and the advice that is given when memory runs out.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import keras
import tensorflow as tf
from tensorflow.python.client import device_lib

from pipeline.config.optimizer import OPTIMIZERS
from pipeline.config.schema import Config
from pipeline.config.train import TrainConfig
from pipeline.data.mixup import mixing_group_size
from pipeline.distributed.devices import Runtime
from pipeline.errors import ConfigError, TrainingError
from pipeline.models.profile import estimated_memory

CONTAINER_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),  # cgroup version 2
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),  # cgroup version 1
)
AUTO_BATCH_SIZE = 256  # images per step; base learning rates are given for this number
# Share of a device's memory that is planned with: the estimate is right to about 20 % and leaves out the workspace of
# convolutions.
MEMORY_FRACTION = 0.7


def device_memory() -> int:
    """Return the bytes that TensorFlow may use on the smallest device that trains.

    The device is a GPU; without GPUs it is the machine, or the container if that has a limit.
    """
    gpus = _gpu_memory_limits()
    if gpus:
        return min(gpus)
    limits = [path.read_text().strip() for path in CONTAINER_LIMITS if path.is_file()]
    return min(
        [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *(int(limit) for limit in limits if limit.isdigit())]
    )


def _gpu_memory_limits() -> list[int]:
    """Return the bytes that TensorFlow may allocate on each GPU.

    `device_lib` is a private module. TensorFlow's public API tells the current and the peak use, but not this limit.
    """
    return [device.memory_limit for device in device_lib.list_local_devices() if device.device_type == "GPU"]


def step_memory(config: Config, model: keras.Model, images: int, *, accumulation: bool) -> int:
    """Return the estimated bytes of a step on one device, see `estimated_memory`.

    Args:
        config: The optimizer and its moving average are used.
        model: A network built by `efficientnet`, in the dtype that it trains in.
        images: Images per micro-batch and device.
        accumulation: True if a step has several micro-batches.
    """
    slots, average = OPTIMIZERS[config.optimizer.name].num_slots, config.optimizer.ema_decay is not None
    return estimated_memory(model, images, optimizer_slots=slots, ema=average, accumulation=accumulation)


def largest_micro_batch(config: Config, model: keras.Model, memory: int) -> int:
    """Return the number of images per micro-batch and device that are estimated to fit.

    Args:
        config: As in `step_memory`.
        model: As in `step_memory`.
        memory: Bytes of a device.

    Returns:
        A number of at least 0.
    """
    without, with_one = (step_memory(config, model, images, accumulation=True) for images in (0, 1))
    return max(0, int((MEMORY_FRACTION * memory - without) / (with_one - without)))


def resolve_batch_size(
    config: Config, runtime: Runtime, model: keras.Model, *, previous: TrainConfig | None = None
) -> Config:
    """Replace `global_batch_size: auto` by 256 images, in as few micro-batches as the devices' memory allows.

    The size of a micro-batch is a power of two, which fits MixUp's groups. If the number of replicas is not a power of
    two, the batch size is the multiple of the micro-batches of all replicas that is nearest to 256.

    Args:
        config: The config; it is returned unchanged if the batch size is a number.
        runtime: Its replicas share the batch.
        model: The network to train.
        previous: The resolved section `train` of the run that is resumed, if any; its values stay, whatever the memory.

    Raises:
        TrainingError: Not even one image is estimated to fit.
    """
    if config.train.global_batch_size != "auto":
        return config
    if previous is not None:
        batch_size, accumulation = previous.batch_size, previous.gradient_accumulation_steps
    else:
        memory = device_memory()
        fitting = min(largest_micro_batch(config, model, memory), max(1, AUTO_BATCH_SIZE // runtime.replicas))
        if not fitting:
            raise TrainingError(
                f"{_model_name(config)} does not fit into {_gib(memory)} with a single image; "
                "take a smaller variant or resolution"
            )
        images_at_once = 2 ** int(math.log2(fitting)) * runtime.replicas
        accumulation = max(1, round(AUTO_BATCH_SIZE / images_at_once))
        batch_size = images_at_once * accumulation
    train = config.train.model_copy(
        update={"global_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    )
    return config.model_copy(update={"train": train})


def check_batch(config: Config, runtime: Runtime) -> None:
    """Check that the replicas can share a batch.

    Raises:
        ConfigError: The global batch cannot be shared evenly among the replicas and their micro-batches, or a
            micro-batch would divide a group of images that are mixed with each other.
    """
    replicas, batch, accumulation = runtime.replicas, config.train.batch_size, config.train.gradient_accumulation_steps
    if batch % (replicas * accumulation):
        raise ConfigError(
            f"train.global_batch_size: {batch} images cannot be shared evenly among {replicas} replicas with "
            f"{accumulation} micro-batches each; take a multiple of {replicas * accumulation}"
        )
    if config.augment.mixup or config.augment.cutmix:
        group, micro_batch = mixing_group_size(batch, accumulation), batch // accumulation // replicas
        if micro_batch % group:
            raise ConfigError(
                f"train.global_batch_size: mixup and cutmix mix groups of {group} images, which {micro_batch} images "
                f"per replica and micro-batch would cut apart; take a multiple of {group * replicas * accumulation}"
            )


@contextmanager
def translate_oom_error(config: Config, runtime: Runtime, model: keras.Model) -> Iterator[None]:
    """Translate TensorFlow's out-of-memory error inside the block into one that says what to do.

    Args:
        config: The resolved config.
        runtime: Its replicas share the batch.
        model: The network that is trained.

    Raises:
        TrainingError: Memory ran out.
    """
    try:
        yield
    except tf.errors.ResourceExhaustedError as error:
        memory = device_memory()
        size = config.train.batch_size // config.train.gradient_accumulation_steps // runtime.replicas
        raise TrainingError(
            f"out of memory with {size} images per device and micro-batch of {_model_name(config)}; "
            f"{min(largest_micro_batch(config, model, memory), size - 1)} are estimated to fit into {_gib(memory)}.\n"
            "Raise train.gradient_accumulation_steps (the result stays the same but for rounding and batch "
            "normalization), set train.global_batch_size=auto, or take a smaller variant or resolution. "
            f"TensorFlow says: {error.message.splitlines()[0][:200]}"
        ) from None


def _model_name(config: Config) -> str:
    return f"EfficientNet-{config.variant.name} at {config.variant.resolution} px"


def _gib(memory: int) -> str:
    return f"{memory / 2**30:.1f} GiB"

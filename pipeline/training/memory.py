"""The number of images that a device can take in one step, by estimate.

It serves `global_batch_size: auto`, and the advice that is given when memory runs out.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import keras
import tensorflow as tf

from pipeline.config.augment import AugmentConfig
from pipeline.config.optimizer import OPTIMIZERS, OptimizerConfig
from pipeline.config.schema import Config
from pipeline.config.train import TrainConfig
from pipeline.console import plural
from pipeline.data.mixup import mixing_group_size
from pipeline.distributed.devices import Runtime, gpu_memory_limits
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
    gpus = gpu_memory_limits()
    if gpus:
        return min(gpus)
    limits = [path.read_text().strip() for path in CONTAINER_LIMITS if path.is_file()]
    return min(
        [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *(int(limit) for limit in limits if limit.isdigit())]
    )


def step_memory(optimizer: OptimizerConfig, model: keras.Model, images: int, *, accumulation: bool) -> int:
    """Return the estimated bytes of a step on one device, see `estimated_memory`.

    Args:
        optimizer: Section `optimizer` of the config: its slots and its moving average count.
        model: A network built by `efficientnet`, in the dtype that it trains in.
        images: Images per micro-batch and device.
        accumulation: True if a step has several micro-batches.
    """
    slots, average = OPTIMIZERS[optimizer.name].num_slots, optimizer.ema_decay is not None
    return estimated_memory(model, images, optimizer_slots=slots, ema=average, accumulation=accumulation)


def largest_micro_batch(optimizer: OptimizerConfig, model: keras.Model, memory: int) -> int:
    """Return the number of images per micro-batch and device that are estimated to fit.

    Args:
        optimizer: As in `step_memory`.
        model: As in `step_memory`.
        memory: Bytes of a device.

    Returns:
        A number of at least 0.
    """
    without, with_one = (step_memory(optimizer, model, images, accumulation=True) for images in (0, 1))
    return max(0, int((MEMORY_FRACTION * memory - without) / (with_one - without)))


class BatchSize(NamedTuple):
    """The images of a step."""

    images: int
    """Over all replicas."""
    accumulation: int
    """Number of micro-batches that they are divided into."""


def resolve_batch_size(
    train: TrainConfig,
    optimizer: OptimizerConfig,
    runtime: Runtime,
    model: keras.Model,
    *,
    previous: TrainConfig | None = None,
) -> BatchSize:
    """Return the batch size: that of the config, or for auto 256 images in as few micro-batches as the memory allows.

    The size of a micro-batch is a power of two, which fits MixUp's groups. If the number of replicas is not a power of
    two, the batch size is the multiple of the micro-batches of all replicas that is nearest to 256.

    Args:
        train: Section `train` of the config.
        optimizer: Section `optimizer` of the config.
        runtime: Its replicas share the batch.
        model: The network to train.
        previous: The resolved section `train` of the run that is resumed, if any; its values stay, whatever the memory.

    Raises:
        ConfigError: Not even one image is estimated to fit.
    """
    if train.global_batch_size == "auto" and previous is not None:
        train = previous
    if train.global_batch_size != "auto":
        return BatchSize(train.global_batch_size, train.gradient_accumulation_steps)
    memory = device_memory()
    fitting = min(largest_micro_batch(optimizer, model, memory), max(1, AUTO_BATCH_SIZE // runtime.replicas))
    if not fitting:
        raise ConfigError(
            f"model.variant: {_describe(model)} does not fit into {_gib(memory)} with a single image; "
            "take a smaller variant or model.resolution"
        )
    images_at_once = 2 ** int(math.log2(fitting)) * runtime.replicas
    accumulation = max(1, round(AUTO_BATCH_SIZE / images_at_once))
    return BatchSize(images_at_once * accumulation, accumulation)


def check_batch(batch_size: BatchSize, augment: AugmentConfig, runtime: Runtime) -> None:
    """Check that the replicas can share a batch.

    Raises:
        ConfigError: The global batch cannot be shared evenly among the replicas and their micro-batches, or a
            micro-batch would divide a group of images that are mixed with each other.
    """
    (batch, accumulation), replicas = batch_size, runtime.replicas
    if batch % (replicas * accumulation):
        raise ConfigError(
            f"train.global_batch_size: {batch} images cannot be shared evenly among {replicas} replicas with "
            f"{accumulation} micro-batches each; take a multiple of {replicas * accumulation}"
        )
    if augment.mixup or augment.cutmix:
        group, micro_batch = mixing_group_size(batch, accumulation), batch // accumulation // replicas
        if micro_batch % group:
            raise ConfigError(
                f"train.global_batch_size: mixup and cutmix mix groups of {group} images, which {micro_batch} images "
                f"per replica and micro-batch would cut apart; take a multiple of {group * replicas * accumulation}"
            )


def check_memory(config: Config, batch_size: BatchSize, runtime: Runtime, model: keras.Model) -> None:
    """Check that a step that trains all layers is estimated to fit into the memory of a device.

    A step that trains fewer layers keeps fewer activations, how many is not estimated; it is not checked.

    Args:
        config: The config; its stages are numbers already.
        batch_size: Images of a step.
        runtime: Its replicas share the batch.
        model: The network to train.

    Raises:
        ConfigError: The estimate is above the memory of the smallest device.
    """
    if all(stage.trainable != "all" for stage in config.train.stages):
        return
    memory, share = device_memory(), batch_size.images // runtime.replicas
    images = share // batch_size.accumulation
    need = step_memory(config.optimizer, model, images, accumulation=batch_size.accumulation > 1)
    if need <= memory:
        return
    fitting = largest_micro_batch(config.optimizer, model, memory)
    if not fitting:
        remedy = "take a smaller variant or model.resolution"
    else:
        steps = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= fitting)
        remedy = f"set train.gradient_accumulation_steps={steps}, or train.global_batch_size=auto"
    raise ConfigError(
        f"train.global_batch_size: {plural(images, 'image')} per device and micro-batch of {_describe(model)} take an "
        f"estimated {_gib(need)}, and a device has {_gib(memory)}; {remedy}"
    )


@contextmanager
def translate_oom_error(
    batch_size: BatchSize, optimizer: OptimizerConfig, runtime: Runtime, model: keras.Model
) -> Iterator[None]:
    """Translate TensorFlow's out-of-memory error inside the block into one that says what to do.

    Args:
        batch_size: Images of a step.
        optimizer: Section `optimizer` of the config.
        runtime: Its replicas share the batch.
        model: The network that is trained.

    Raises:
        TrainingError: Memory ran out.
    """
    try:
        yield
    except tf.errors.ResourceExhaustedError as error:
        memory = device_memory()
        size = batch_size.images // batch_size.accumulation // runtime.replicas
        fitting = min(largest_micro_batch(optimizer, model, memory), size - 1)
        raise TrainingError(
            f"out of memory with {plural(size, 'image')} per device and micro-batch of {_describe(model)}; "
            f"{fitting} are estimated to fit into {_gib(memory)}.\n"
            "Raise train.gradient_accumulation_steps (the result stays the same but for rounding and batch "
            "normalization), set train.global_batch_size=auto, or take a smaller variant or resolution. "
            f"TensorFlow says: {error.message.splitlines()[0][:200]}"
        ) from None


def _describe(model: keras.Model) -> str:
    return f"{model.name} at {model.input_shape[1]} px"


def _gib(memory: int) -> str:
    return f"{memory / 2**30:.1f} GiB"

"""How many images a device takes in one step, by estimate: for `global_batch_size.

Auto`, and for advice where memory runs out.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import keras
import tensorflow as tf
from tensorflow.python.client import device_lib

from pipeline.config.schema import Config
from pipeline.config.train import TrainConfig
from pipeline.data.mixup import mixing_group
from pipeline.distributed.devices import Runtime
from pipeline.errors import ConfigError, TrainingError
from pipeline.models.profile import estimated_memory

CONTAINER_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)  # of version 2, of version 1
AUTO_BATCH_SIZE = 256  # images per step; learning rates are given for so many
# of a device's memory that is planned with: the estimate is right to about 20 % and leaves out what convolutions work
# in
MEMORY_FRACTION = 0.7


def device_memory() -> int:
    """Bytes that TensorFlow may take on the smallest device that trains.

    A GPU's, or where there is none the machine's or container's.
    """
    gpus = [device.memory_limit for device in device_lib.list_local_devices() if device.device_type == "GPU"]
    if gpus:
        return min(gpus)
    limits = [path.read_text().strip() for path in CONTAINER_LIMITS if path.is_file()]
    return min(
        [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *(int(limit) for limit in limits if limit.isdigit())]
    )


def step_memory(config: Config, model: keras.Model, images: int, *, accumulation: bool) -> int:
    """Estimated bytes of a step on one device, see `estimated_memory`.

    Args:
        config: Optimizer and moving average are looked at.
        model: Built by `efficientnet`, in the dtype that it trains in.
        images: Per micro-batch and device.
        accumulation: Whether there is more than one micro-batch.
    """
    slots, average = 1 if config.optimizer.name == "sgd" else 2, config.optimizer.ema_decay is not None
    return estimated_memory(model, images, optimizer_slots=slots, ema=average, accumulation=accumulation)


def largest_micro_batch(config: Config, model: keras.Model, memory: int) -> int:
    """Images per micro-batch and device that are estimated to fit.

    Args:
        config: As of `step_memory`.
        model: As of `step_memory`.
        memory: Bytes of a device.

    Returns:
        At least 0.
    """
    without, with_one = (step_memory(config, model, images, accumulation=True) for images in (0, 1))
    return max(0, int((MEMORY_FRACTION * memory - without) / (with_one - without)))


def resolve_batch_size(
    config: Config, runtime: Runtime, model: keras.Model, *, previous: TrainConfig | None = None
) -> Config:
    """Replace `global_batch_size: auto` by 256 images and as many micro-batches as the devices' memory asks for.

    Micro-batches are of a power of two, which fits MixUp's groups. Where the number of replicas is none, the images of
    a step are the multiple of the micro-batches of all replicas that is nearest to 256.

    Args:
        config: Comes back as it is where the batch size is a number.
        runtime: Its replicas share the batch.
        model: What is to be trained.
        before: What a run that is resumed settled on; it stays with that, whatever memory there is now.

    Raises:
        TrainingError: If not even one image is estimated to fit.
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
                f"{_network(config)} does not fit into {_gib(memory)} with a single image; take a smaller variant or resolution"
            )
        together = 2 ** int(math.log2(fitting)) * runtime.replicas
        accumulation = max(1, round(AUTO_BATCH_SIZE / together))
        batch_size = together * accumulation
    train = config.train.model_copy(
        update={"global_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    )
    return config.model_copy(update={"train": train})


@contextmanager
def translate_oom_error(config: Config, runtime: Runtime, model: keras.Model) -> Iterator[None]:
    """Turns TensorFlow's word that memory ran out into one that says what to do.

    Raises:
        TrainingError: In its place.
    """
    try:
        yield
    except tf.errors.ResourceExhaustedError as error:
        memory = device_memory()
        size = config.train.batch_size // config.train.gradient_accumulation_steps // runtime.replicas
        raise TrainingError(
            f"out of memory with {size} images per device and micro-batch of {_network(config)}; "
            f"{min(largest_micro_batch(config, model, memory), size - 1)} are estimated to fit into {_gib(memory)}.\n"
            f"Raise train.gradient_accumulation_steps (the result stays the same but for rounding and batch normalisation), set "
            f"train.global_batch_size=auto, or take a smaller variant or resolution. TensorFlow says: {error.message.splitlines()[0][:200]}"
        ) from None


def _network(config: Config) -> str:
    return f"EfficientNet-{config.variant.name} at {config.variant.resolution} px"


def _gib(memory: int) -> str:
    return f"{memory / 2**30:.1f} GiB"


def check_batch(config: Config, runtime: Runtime) -> None:
    """Make sure that training batches can be cut up.

    Raises:
        ConfigError: If the global batch cannot be shared evenly among the replicas and their micro-batches, or a cut
            would go through a group of images that are mixed with each other.
    """
    replicas, batch, accumulation = runtime.replicas, config.train.batch_size, config.train.gradient_accumulation_steps
    if batch % (replicas * accumulation):
        raise ConfigError(
            f"train.global_batch_size: {batch} images cannot be shared evenly among {replicas} replicas with {accumulation} "
            f"micro-batches each; take a multiple of {replicas * accumulation}"
        )
    if config.augment.mixup or config.augment.cutmix:
        group, micro_batch = mixing_group(batch, accumulation), batch // accumulation // replicas
        if micro_batch % group:
            raise ConfigError(
                f"train.global_batch_size: mixup and cutmix mix groups of {group} images, which {micro_batch} images per replica and "
                f"micro-batch would cut apart; take a multiple of {group * replicas * accumulation}"
            )

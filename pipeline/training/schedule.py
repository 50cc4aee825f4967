"""The schedule of a run: the steps of its stages, their learning rates, and the layers that each stage trains."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import keras
import numpy as np

from pipeline.config.optimizer import OptimizerConfig
from pipeline.config.train import StageConfig
from pipeline.console import plural
from pipeline.errors import ConfigError
from pipeline.models.efficientnet import CLASSIFIER_BLOCK, block_of


@dataclass(frozen=True)
class TrainStage:
    """A range of steps with one set of trainable weights.

    Attributes:
        number: Index of the stage, from 0.
        config: The stage as the config has it.
        first: First step, counted from the start of the run.
        stop: The step after the last one.
        learning_rate: Maps a step, counted from the start of the stage, to its learning rate.
    """

    number: int
    config: StageConfig
    first: int
    stop: int
    learning_rate: Callable[[int], float]


@dataclass(frozen=True)
class TrainSchedule:
    """All stages of a run.

    Attributes:
        global_batch_size: Images per step over all replicas.
        steps_per_epoch: Steps between two validations.
        stages: The stages in their order, at least one.
    """

    global_batch_size: int
    steps_per_epoch: int
    stages: tuple[TrainStage, ...]

    @property
    def total_steps(self) -> int:
        """Number of steps of the run."""
        return self.stages[-1].stop

    def stage_at(self, step: int) -> TrainStage:
        """Return the stage that a step, counted from the start of the run, belongs to."""
        return next(stage for stage in self.stages if step < stage.stop)


def learning_rate_schedule(
    optimizer: OptimizerConfig, stage: StageConfig, *, global_batch_size: int, steps_per_epoch: int
) -> Callable[[int], float]:
    """Return the learning rate of a stage as a function of the step within the stage.

    It warms up linearly from zero; after that it is `exponential`
    (base * decay_rate^floor(step / (decay_epochs * steps_per_epoch)), where step counts from the start of the stage,
    warm-up included, as in the official code), `cosine` (from the end of warm-up to zero at the end of the stage) or
    `constant`. The base is base_lr * global_batch_size / 256.
    """
    base = (stage.base_lr or optimizer.base_lr) * global_batch_size / 256
    schedule = stage.schedule or optimizer.schedule
    warmup_epochs = optimizer.warmup_epochs if stage.warmup_epochs is None else stage.warmup_epochs
    warmup, total = warmup_epochs * steps_per_epoch, stage.epochs * steps_per_epoch

    def learning_rate(step: int) -> float:
        if step < warmup:
            return base * (step + 1) / (warmup + 1)
        if schedule == "exponential":
            return base * optimizer.decay_rate ** int(step / (optimizer.decay_epochs * steps_per_epoch))
        if schedule == "cosine":
            return base * 0.5 * (1 + float(np.cos(np.pi * (step - warmup) / (total - warmup))))
        return base

    return learning_rate


def build_schedule(
    stage_configs: Sequence[StageConfig], optimizer: OptimizerConfig, *, global_batch_size: int, steps_per_epoch: int
) -> TrainSchedule:
    """Convert the epochs of `train.stages` to steps.

    Args:
        stage_configs: `train.stages` of a config.
        optimizer: Section `optimizer` of the config.
        global_batch_size: Images per step over all replicas.
        steps_per_epoch: Steps between two validations.
    """
    stages: list[TrainStage] = []
    for stage in stage_configs:
        first = stages[-1].stop if stages else 0
        rate = learning_rate_schedule(
            optimizer, stage, global_batch_size=global_batch_size, steps_per_epoch=steps_per_epoch
        )
        stages.append(TrainStage(len(stages), stage, first, first + stage.epochs * steps_per_epoch, rate))
    return TrainSchedule(global_batch_size, steps_per_epoch, tuple(stages))


def is_layer_trainable(stage: StageConfig, layer: keras.layers.Layer) -> bool:
    """Return True if a stage changes the weights of a layer; for batch normalization also its statistics."""
    lowest = (
        {"head": CLASSIFIER_BLOCK, "all": 0}[stage.trainable]
        if stage.trainable in ("head", "all")
        else int(stage.trainable.removeprefix("block"))
    )
    frozen_statistics = stage.freeze_batch_norm and isinstance(layer, keras.layers.BatchNormalization)
    return block_of(layer.name) >= lowest and not frozen_statistics


def set_trainable(model: keras.Model, stage: StageConfig) -> None:
    """Freeze and unfreeze the blocks of a network as a stage says.

    A frozen block runs as in inference: its statistics do not change.
    """
    for layer in model.layers:
        layer.trainable = is_layer_trainable(stage, layer)


def check_uninitialized_layers(
    model: keras.Model, uninitialized_layers: Iterable[str], stages: Sequence[StageConfig]
) -> None:
    """Check that some stage trains every layer that starts from random values.

    Args:
        model: The network.
        uninitialized_layers: Names of its layers that no weights were loaded into.
        stages: All stages of the run.

    Raises:
        ConfigError: No stage trains such a layer.
    """
    stuck = [
        name
        for name in uninitialized_layers
        if not any(is_layer_trainable(stage, model.get_layer(name)) for stage in stages)
    ]
    if stuck:
        names = ", ".join(stuck[:8]) + (f" and {len(stuck) - 8} more" if len(stuck) > 8 else "")
        raise ConfigError(
            f"train.stages: no stage trains {plural(len(stuck), 'layer')} that the weights do not fit and that are "
            f"random so far: {names}; let a stage train all, and one with freeze_batch_norm: false if some are batch "
            "normalization (_bn)"
        )

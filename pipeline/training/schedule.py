"""The schedule of a run: the steps of its stages, their learning rates, and the layers that each of them trains."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import keras

from pipeline.config.schema import Config
from pipeline.config.train import StageConfig
from pipeline.errors import ConfigError
from pipeline.models.efficientnet import CLASSIFIER_BLOCK, block_of
from pipeline.training.optimizers import learning_rate


@dataclass(frozen=True)
class TrainStage:
    """A stretch of steps with one set of trainable weights.

    Attributes:
        number: Its place among the stages, from 0.
        config: As the YAML has it.
        first: Its first step, counted from the start of the run.
        stop: The step behind its last.
        learning_rate: Of the step counted from the start of the stage.
    """

    number: int
    config: StageConfig
    first: int
    stop: int
    learning_rate: Callable[[int], float]


def build_schedule(config: Config, steps_per_epoch: int) -> tuple[TrainStage, ...]:
    """Turns epochs into steps, once."""
    stages: list[TrainStage] = []
    for stage in config.train.stages:
        first = stages[-1].stop if stages else 0
        rate = learning_rate(
            config.optimizer, stage, global_batch_size=config.train.batch_size, steps_per_epoch=steps_per_epoch
        )
        stages.append(TrainStage(len(stages), stage, first, first + stage.epochs * steps_per_epoch, rate))
    return tuple(stages)


def is_layer_trainable(stage: StageConfig, layer: keras.layers.Layer) -> bool:
    """Whether a stage moves the weights of a layer, and the statistics of batch normalisation."""
    lowest = (
        {"head": CLASSIFIER_BLOCK, "all": 0}[stage.trainable]
        if stage.trainable in ("head", "all")
        else int(stage.trainable.removeprefix("block"))
    )
    frozen_statistics = stage.freeze_batch_norm and isinstance(layer, keras.layers.BatchNormalization)
    return block_of(layer.name) >= lowest and not frozen_statistics


def set_trainable(model: keras.Model, stage: StageConfig) -> None:
    """Freezes and thaws whole blocks as a stage says.

    A frozen block runs as in inference: its statistics do not move.
    """
    for layer in model.layers:
        layer.trainable = is_layer_trainable(stage, layer)


def check_new_layers(model: keras.Model, new: Iterable[str], stages: Sequence[StageConfig]) -> None:
    """Make sure that no layer that starts from random values stays as it is.

    Args:
        model: The network.
        new: Names of its layers that no weights were loaded into.
        stages: Of the whole run.

    Raises:
        ConfigError: No stage trains such a layer.
    """
    stuck = [name for name in new if not any(is_layer_trainable(stage, model.get_layer(name)) for stage in stages)]
    if stuck:
        named = ", ".join(stuck[:8]) + (f" and {len(stuck) - 8} more" if len(stuck) > 8 else "")
        raise ConfigError(
            f"train.stages: no stage trains {len(stuck)} layers that the weights do not fit and that are random so far: {named}; let a "
            "stage train all, and one with freeze_batch_norm: false if some are batch normalisation (_bn)"
        )

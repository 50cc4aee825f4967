"""The section `optimizer`: optimizer, learning rate and moving average; and the table of optimizers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.base import PositiveFloat, Schedule, StrictModel


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer that a config can name.

    Attributes:
        keras_class: Its class in `keras.optimizers`. `pipeline.training.optimizers` may put a faster one in its place.
        arguments: Arguments of the class beside the learning rate.
        decoupled_weight_decay: Whether weight decay shrinks the weights themselves (arXiv 1711.05101), rather than
            adding half the squared norm to the loss.
        num_slots: Numbers that it keeps for each trainable parameter.
    """

    keras_class: str
    arguments: Mapping[str, float | bool] = field(default_factory=dict)
    decoupled_weight_decay: bool = True
    num_slots: int = 2


OPTIMIZERS = {
    "rmsprop": OptimizerSpec(
        "RMSprop", {"rho": 0.9, "momentum": 0.9, "epsilon": 1e-3}, decoupled_weight_decay=False
    ),  # the constants of tensorflow/tpu, models/official/efficientnet
    "sgd": OptimizerSpec("SGD", {"momentum": 0.9, "nesterov": True}, decoupled_weight_decay=False, num_slots=1),
    "adamw": OptimizerSpec("AdamW"),
    "lamb": OptimizerSpec("Lamb"),  # arXiv 1904.00962: for batches of thousands of images
    "lion": OptimizerSpec("Lion", num_slots=1),  # arXiv 2302.06675: a tenth of AdamW's learning rate
}


class OptimizerConfig(StrictModel):
    """Optimizer, learning rate and moving average. The defaults are the paper's recipe."""

    name: Literal[tuple(OPTIMIZERS)] = "rmsprop"  # type: ignore[valid-type]
    """rmsprop: as in TensorFlow 1 (decay 0.9, momentum 0.9, epsilon 1e-3, accumulator from ones); sgd: Nesterov,
    momentum 0.9; adamw, lamb, lion: as in Keras."""
    base_lr: PositiveFloat = 0.016
    """Learning rate per 256 images; multiplied by global_batch_size / 256."""
    schedule: Schedule = "exponential"
    """exponential: times decay_rate every decay_epochs, in steps; cosine: to zero at the end of the stage; constant."""
    decay_rate: Annotated[float, Field(gt=0, le=1)] = 0.97
    """Factor of the exponential schedule."""
    decay_epochs: PositiveFloat = 2.4
    """Period of the exponential schedule."""
    warmup_epochs: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Linear warm-up at the start of each stage."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-5
    """rmsprop, sgd: factor of half the squared norm in the loss; adamw, lamb, lion: decoupled. Batch normalization is
    exempt."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = 0.9999
    """Decay of the exponential moving average of all weights and statistics, min(ema_decay, (1 + step) / (10 + step));
    null turns it off."""

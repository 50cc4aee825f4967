"""The section `optimizer`: optimizer, learning rate and moving average."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.base import PositiveFloat, Schedule, StrictModel


class OptimizerConfig(StrictModel):
    """Optimizer, learning rate and moving average. The defaults are the paper's recipe."""

    name: Literal["rmsprop", "sgd", "adamw"] = "rmsprop"
    """rmsprop: as in TensorFlow 1 (decay 0.9, momentum 0.9, epsilon 1e-3, accumulator from ones); sgd: Nesterov,
    momentum 0.9; adamw."""
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
    """rmsprop, sgd: factor of half the squared norm in the loss; adamw: decoupled. Batch normalization is exempt."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = 0.9999
    """Decay of the exponential moving average of all weights and statistics, min(ema_decay, (1 + step) / (10 + step));
    null turns it off."""

"""The state of a run between two steps: network, optimizer, moving average, metrics and counters."""

import hashlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from pipeline.training.optimizers import ModelEMA


class MetricAccumulator:
    """Sums over the steps since the last reset. They stay on the device, so that only `read` waits for it.

    Attributes:
        sums: float64 scalars by name. `loss`: sum of the losses of the images (nats, including label smoothing and
            mixing); `correct`: images whose largest logit is at their largest label; `images`: number of images;
            `gradient_norm`: sum over the steps of the gradient's Euclidean norm; `steps`: number of applied steps.
        halted: True if a step was not finite. That step and the steps after it changed nothing.
    """

    NAMES = ("loss", "correct", "images", "gradient_norm", "steps")

    def __init__(self) -> None:
        """Create sums of zero."""
        aggregation = tf.VariableAggregation.ONLY_FIRST_REPLICA
        self.sums = {
            name: tf.Variable(0.0, dtype=tf.float64, trainable=False, aggregation=aggregation) for name in self.NAMES
        }
        self.halted = tf.Variable(False, trainable=False, aggregation=aggregation)

    def read(self) -> dict[str, float]:
        """Return the sums by name, after the steps that the device still computes."""
        return {name: float(variable.numpy()) for name, variable in self.sums.items()}

    def reset(self) -> None:
        """Set every sum to zero."""
        for variable in self.sums.values():
            variable.assign(0.0)


@dataclass
class TrainState:
    """The complete state of a run between two steps.

    Attributes:
        model: The network, including its batch normalization statistics and the state of its random generators.
        optimizer: Optimizer with slots for all trainable variables of the network.
        ema: Moving average; None if the run keeps none.
        metrics: Sums of the metrics over the current epoch.
        step: Number of steps since the start of the run.
        history: A record for each completed epoch.
        best: The record of the best epoch so far; None before the first.
        skipped: Steps of the stream that were skipped because they were not finite, counted from 0.
        rollbacks: Number of returns to the start of an epoch because a step was not finite.
        changes: Changes that `--allow-change` accepted: `step`, `key`, `was` and `is` of each.
    """

    model: keras.Model
    optimizer: keras.optimizers.Optimizer
    ema: ModelEMA | None
    metrics: MetricAccumulator
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, float] | None = None
    skipped: list[int] = field(default_factory=list)
    rollbacks: int = 0
    changes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def epoch_start(self) -> int:
        """The step after the last completed epoch."""
        return int(self.history[-1]["step"]) if self.history else 0

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context in which the network holds the moving average, if the run keeps one."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def describe_changes(self) -> list[str]:
        """Return a line for each of `changes`."""
        return [
            f"{change['key']}: {change['was']!r} -> {change['is']!r} after step {change['step']}"
            for change in self.changes
        ]

    def groups(self) -> dict[str, dict[str, keras.Variable | tf.Variable]]:
        """Return all variables by group and by a name that is the same in every process."""
        weights = {
            f"{layer.name}/{variable.name}": variable for layer in self.model.layers for variable in layer.variables
        }
        groups: dict[str, dict[str, Any]] = {
            "model": weights,
            "optimizer": {
                f"{number:05d}/{variable.name}": variable for number, variable in enumerate(self.optimizer.variables)
            },
            "totals": dict(self.metrics.sums),
        }
        if self.ema is not None:
            groups["average"] = dict(zip(self.averaged_variables(), self.ema.variables, strict=True))
        return groups

    def averaged_variables(self) -> dict[str, keras.Variable]:
        """Return the network's variable that belongs to each average, by the name of the average in `groups`."""
        averaged = [] if self.ema is None else self.ema.averaged
        return {f"{number:05d}/{variable.name}": variable for number, variable in enumerate(averaged)}

    def digest(self) -> str:
        """Return the SHA-256 of all variables, hexadecimal."""
        digest = hashlib.sha256()
        for group in self.groups().values():
            for variable in group.values():
                digest.update(np.ascontiguousarray(variable.numpy()).tobytes())
        return digest.hexdigest()

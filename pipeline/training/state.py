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
    """Sums over the steps since the last reset, kept on the device so that reading them is the only wait for it.

    Attributes:
        loss: Sum of the images' losses (nats, label smoothing and mixing included), float64 scalar.
        correct: Images whose largest logit is at their largest label, float64 scalar.
        images: Images seen, float64 scalar.
        gradient_norm: Sum over the steps of the gradient's Euclidean norm, float64 scalar.
        steps: Steps applied, float64 scalar.
        halted: Whether a step was not finite. That step and those after it changed nothing.
    """

    NAMES = ("loss", "correct", "images", "gradient_norm", "steps")

    def __init__(self) -> None:
        aggregation = tf.VariableAggregation.ONLY_FIRST_REPLICA
        self.sums = {
            name: tf.Variable(0.0, dtype=tf.float64, trainable=False, aggregation=aggregation) for name in self.NAMES
        }
        self.halted = tf.Variable(False, trainable=False, aggregation=aggregation)

    def read(self) -> dict[str, float]:
        """The sums on the host; waits for the steps under way."""
        return {name: float(variable.numpy()) for name, variable in self.sums.items()}

    def reset(self) -> None:
        """Set every sum to zero."""
        for variable in self.sums.values():
            variable.assign(0.0)


@dataclass
class TrainState:
    """All that a run is at one point between two steps.

    Attributes:
        model: The network, its batch normalisation statistics and the state of its random generators included.
        optimizer: With the slots of all the network's trainable variables.
        average: The moving average, if the run keeps one.
        totals: Sums of the metrics of the epoch under way.
        step: Steps taken since the start of the run.
        history: One record for each epoch that ended.
        best: The record of the best epoch so far, None before the first.
        skipped: Steps of the stream that were passed over because they were not finite, counted from 0.
        rollbacks: How often the run went back to the start of an epoch because a step was not finite.
        changes: What `--allow-change` let pass: `step`, `key`, `was` and `is` of each change.
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
        """The step behind the last epoch that ended."""
        return int(self.history[-1]["step"]) if self.history else 0

    def averaged(self) -> AbstractContextManager[None]:
        """A block inside which the network holds the moving average, where the run keeps one."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def describe_changes(self) -> list[str]:
        """A line for each of `changes`."""
        return [
            f"{change['key']}: {change['was']!r} -> {change['is']!r} behind step {change['step']}"
            for change in self.changes
        ]

    def groups(self) -> dict[str, dict[str, keras.Variable | tf.Variable]]:
        """Every variable by group and by a name that is the same in every process."""
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
        """The network's variable behind each average, by the average's name in `groups`."""
        averaged = [] if self.ema is None else self.ema.averaged
        return {f"{number:05d}/{variable.name}": variable for number, variable in enumerate(averaged)}

    def digest(self) -> str:
        """SHA-256 of every variable, hexadecimal."""
        digest = hashlib.sha256()
        for group in self.groups().values():
            for variable in group.values():
                digest.update(np.ascontiguousarray(variable.numpy()).tobytes())
        return digest.hexdigest()

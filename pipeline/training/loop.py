"""The training loop: stages, epochs, validation. It knows nothing of files or MLflow: hooks that the caller wires in do."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import keras
import tensorflow as tf

from pipeline.config import Config, StageConfig
from pipeline.model.efficientnet import CLASSIFIER_BLOCK, block_of
from pipeline.training.checkpoint import State
from pipeline.training.not_finite import give_up, learning_rate_factor
from pipeline.training.optimizer import learning_rate
from pipeline.training.runtime import Runtime
from pipeline.training.step import TrainStep

REPORTS_PER_EPOCH = 20
SECONDS_PER_PROGRESS = 0.5


class Hook(Protocol):
    """What a caller may want to know of a run. Called in the order of the list, between steps."""

    def on_progress(self, step: int, metrics: Mapping[str, float]) -> None:
        """About twice a second, with the means of the epoch so far."""

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """At fixed steps, some twenty in an epoch, with the means of the epoch so far."""

    def on_epoch(self, record: Mapping[str, float]) -> None:
        """After each epoch and its validation, with its record."""

    def on_checkpoint(self, state: State) -> None:
        """When the state should be kept: after each epoch, at the steps that the config names, and before the run is interrupted."""


@dataclass(frozen=True)
class Stage:
    """A stretch of steps with one set of trainable weights.

    Attributes:
        config: As the YAML has it.
        first: Its first step, counted from the start of the run.
        stop: The step behind its last.
        learning_rate: Of the step counted from the start of the stage.
    """

    config: StageConfig
    first: int
    stop: int
    learning_rate: Callable[[int], float]


def plan(config: Config, steps_per_epoch: int) -> tuple[Stage, ...]:
    """Turns epochs into steps, once."""
    stages: list[Stage] = []
    for stage in config.train.stages:
        first = stages[-1].stop if stages else 0
        rate = learning_rate(config.optimizer, stage, global_batch_size=config.train.global_batch_size, steps_per_epoch=steps_per_epoch)
        stages.append(Stage(stage, first, first + stage.epochs * steps_per_epoch, rate))
    return tuple(stages)


def set_trainable(model: keras.Model, stage: StageConfig) -> None:
    """Freezes and thaws whole blocks as a stage says. A frozen block runs as in inference: its statistics do not move."""
    lowest = (
        {"head": CLASSIFIER_BLOCK, "all": 0}[stage.trainable]
        if stage.trainable in ("head", "all")
        else int(stage.trainable.removeprefix("block"))
    )
    for layer in model.layers:
        frozen_statistics = stage.freeze_batch_norm and isinstance(layer, keras.layers.BatchNormalization)
        layer.trainable = block_of(layer.name) >= lowest and not frozen_statistics


class Interrupted(Exception):  # noqa: N818 - it is no error
    """The run was asked to stop and did so behind a whole step, its state handed to the hooks."""


class Trainer:
    """Takes a state through the stages of its run."""

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        steps_per_epoch: int,
        hooks: Sequence[Hook],
        stop_requested: Callable[[], bool],
        on_not_finite: Callable[[State], None] = give_up,
    ) -> None:
        """Plans the run.

        Args:
            config: What to train and for how long.
            runtime: Where.
            steps_per_epoch: Steps between two validations.
            hooks: Told of progress, epochs and checkpoints.
            stop_requested: Asked after every step; True ends the run there.
            on_not_finite: Given the state in front of a step whose loss or gradient is not finite; raises, or leaves the state where the
                run should go on, with the step among its `skipped` or at an earlier step.
        """
        self._config, self._runtime, self._hooks, self._stop_requested = config, runtime, hooks, stop_requested
        self._on_not_finite, self._steps_per_epoch = on_not_finite, steps_per_epoch
        self._report_every = max(1, steps_per_epoch // REPORTS_PER_EPOCH)
        self.stages = plan(config, steps_per_epoch)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.stages[-1].stop

    def run(
        self, state: State, training_stream: Callable[[int], tf.data.Dataset], validate: Callable[[], Mapping[str, float]]
    ) -> list[dict[str, float]]:
        """Trains from `state.step` to the end of the last stage.

        Args:
            state: Changed in place.
            training_stream: Gives the endless stream of global batches from a step on.
            validate: Gives the metrics of the validation split for the network as it is now, by name; called with the moving
                average in place. Empty where there is no such split.

        Returns:
            The history: a record for each epoch, those before a resume included.

        Raises:
            TrainingError: If the loss or its gradient is not finite. Nothing of that step was applied.
            Interrupted: If a stop was requested.
        """
        while state.step < self.total_steps:
            stage = next(stage for stage in self.stages if state.step < stage.stop)
            set_trainable(state.model, stage.config)
            with self._runtime.strategy.scope():
                step = TrainStep(state.model, state.optimizer, state.average, state.totals, self._config, self._runtime)
            self._run_stage(stage, step, state, training_stream, validate)
        return state.history

    def _batches(self, training_stream: Callable[[int], tf.data.Dataset], start: int) -> Iterator[Any]:
        batches: Iterable[Any] = self._runtime.feed(training_stream(start))
        return iter(batches)

    def _run_stage(
        self,
        stage: Stage,
        train_step: TrainStep,
        state: State,
        training_stream: Callable[[int], tf.data.Dataset],
        validate: Callable[[], Mapping[str, float]],
    ) -> None:
        shown = time.monotonic()
        batches = self._batches(training_stream, state.step)
        while stage.first <= state.step < stage.stop:  # a rollback may lead into the stage before
            batch, rate = next(batches), stage.learning_rate(state.step - stage.first) * learning_rate_factor(state)
            if state.step not in state.skipped:
                train_step(batch, rate)
            state.step += 1
            epoch_ends = state.step % self._steps_per_epoch == 0
            report = state.step % self._report_every == 0
            save = epoch_ends or state.step % (self._config.train.checkpoint_every_steps or self._steps_per_epoch) == 0
            if not (report or save or self._stop_requested() or time.monotonic() - shown > SECONDS_PER_PROGRESS):
                continue  # without waiting for the device
            if bool(state.totals.halted.numpy()):
                self._go_back_before_bad_step(state)
                self._on_not_finite(state)
                batches = self._batches(training_stream, state.step)
                continue
            metrics = self._means(state, rate)
            shown = time.monotonic()
            for hook in self._hooks:
                hook.on_progress(state.step, metrics)
                if report:
                    hook.on_step(state.step, metrics)
            if epoch_ends:
                self._end_epoch(state, metrics, validate)
            if save or self._stop_requested():
                for hook in self._hooks:
                    hook.on_checkpoint(state)
                if self._stop_requested():
                    raise Interrupted

    def _means(self, state: State, rate: float) -> dict[str, float]:
        """The epoch's means so far."""
        sums = state.totals.read()
        images, steps = max(sums["images"], 1.0), max(sums["steps"], 1.0)
        return {
            "train/loss": sums["loss"] / images,
            "train/accuracy": sums["correct"] / images,
            "train/gradient_norm": sums["gradient_norm"] / steps,
            "learning_rate": rate,
        }

    def _go_back_before_bad_step(self, state: State) -> None:
        """Undoes the counting of steps that came after one that is not finite: like it, they changed nothing."""
        state.step = int(state.optimizer.iterations.numpy()) + len(state.skipped)
        state.totals.halted.assign(False)

    def _end_epoch(self, state: State, metrics: Mapping[str, float], validate: Callable[[], Mapping[str, float]]) -> None:
        with state.averaged():
            validation = validate()
        record = {"epoch": state.step // self._steps_per_epoch, "step": state.step, **metrics, **validation}
        state.history.append(record)
        if self._is_best(record, state.best):
            state.best = record
        state.totals.reset()
        for hook in self._hooks:
            hook.on_epoch(record)

    def _is_best(self, record: Mapping[str, float], best: Mapping[str, float] | None) -> bool:
        key, sign = ("val/loss", -1) if self._config.train.best_metric == "loss" else ("val/accuracy", 1)
        return key in record and (best is None or sign * record[key] > sign * best[key])

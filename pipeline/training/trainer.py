"""The training loop: stages, epochs, validation.

It knows nothing of files or MLflow: hooks that the caller wires in do.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from pipeline.config.schema import Config
from pipeline.data.data_service import with_watchdog
from pipeline.distributed.devices import Runtime
from pipeline.distributed.signals import TrainingInterrupted
from pipeline.evaluation.metrics import METRICS
from pipeline.training.callbacks import Callback
from pipeline.training.nan_policy import learning_rate_factor, raise_nan_error
from pipeline.training.schedule import TrainSchedule, TrainStage, set_trainable
from pipeline.training.state import TrainState
from pipeline.training.train_step import TrainStep

LOGS_PER_EPOCH = 20
SECONDS_PER_PROGRESS = 0.5
STEPS_PER_SYNC = 10  # of several processes, which have to look at the same steps whether one is asked to stop


@dataclass(frozen=True)
class StageInputs:
    """What a stage trains, and on what.

    Attributes:
        model: What the step calls: the network, or only its head where the stream gives the features of a frozen
            backbone.
        stream: Gives the endless stream of global batches from a step on.
        validate: Gives the metrics of the validation split for the network as it is now, by name; called with the
            moving average in place. Empty where there is no such split.
    """

    model: keras.Model
    stream: Callable[[int], tf.data.Dataset]
    validate: Callable[[], Mapping[str, float]]


class Trainer:
    """Take a state through the stages of its run."""

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        schedule: TrainSchedule,
        callbacks: Sequence[Callback],
        stop_requested: Callable[[], bool],
        on_nan: Callable[[TrainState], None] = raise_nan_error,
        *,
        class_weights: np.ndarray | None = None,
    ) -> None:
        """Prepare the run.

        Args:
            config: What to train.
            runtime: Where.
            schedule: Stages and steps of the run.
            hooks: Told of progress, epochs and checkpoints.
            stop_requested: Asked after every step, by several processes after every tenth; True ends the run there.
            on_not_finite: Given the state in front of a step whose loss or gradient is not finite; raises, or leaves
                the state where the run should go on, with the step among its `skipped` or at an earlier step.
            class_weights: float32 (K,), how many images an image of each class counts as in the loss; None for one
                each.
        """
        self._config, self._runtime, self._callbacks, self._stop_requested = config, runtime, callbacks, stop_requested
        self._on_nan, self._schedule, self._class_weights = on_nan, schedule, class_weights
        self._steps_per_epoch = schedule.steps_per_epoch
        self._log_every = max(1, schedule.steps_per_epoch // LOGS_PER_EPOCH)

    def fit(self, state: TrainState, stage_inputs: Callable[[TrainStage], StageInputs]) -> list[dict[str, float]]:
        """Train from `state.step` to the end of the last stage.

        Args:
            state: Changed in place.
            work: Says what a stage trains on; asked when the stage begins or is gone on with, what is trainable being
                settled.

        Returns:
            The history: a record for each epoch, those before a resume included.

        Raises:
            TrainingError: If the loss or its gradient is not finite. Nothing of that step was applied.
            TrainingInterrupted: If a stop was requested.
        """
        while state.step < self._schedule.total_steps:
            stage = self._schedule.stage_at(state.step)
            if self._should_stop_early(stage, state.history):
                for hook in self._callbacks:
                    hook.on_early_stop((stage.stop - state.step) // self._steps_per_epoch)
                state.step = stage.stop  # the steps of an epoch stay the same whatever was left out before it
                continue
            set_trainable(state.model, stage.config)
            self._run_stage(stage, state, stage_inputs(stage))
        return state.history

    def _batches(self, work: StageInputs, start: int) -> Iterator[Any]:
        batches: Iterable[Any] = self._runtime.feed(work.stream(start))
        servers = self._config.runtime.data_service
        return with_watchdog(batches, servers) if servers else iter(batches)

    def make_train_step(self, stage: TrainStage, state: TrainState, model: keras.Model) -> TrainStep:
        """A step of a stage, what is trainable being settled.

        It moves the averages of what is followed by the time that it is compiled.
        """
        with self._runtime.strategy.scope():
            return TrainStep(
                model,
                state.optimizer,
                state.ema,
                state.metrics,
                self._config,
                self._runtime,
                layer_decay=stage.config.layer_decay,
                class_weights=self._class_weights,
            )

    def _run_stage(self, stage: TrainStage, state: TrainState, work: StageInputs) -> None:
        train_step, warm = self.make_train_step(stage, state, work.model), False
        left_out = state.step - self._applied_steps(state)  # by early stopping of the stages before
        shown = time.monotonic()
        batches = self._batches(work, state.step)
        while state.step < stage.stop:
            batch, rate = next(batches), stage.learning_rate(state.step - stage.first) * learning_rate_factor(state)
            if state.step not in state.skipped:
                began = time.monotonic()
                train_step(batch, rate)
                if not warm:
                    state.metrics.read()  # waits for the device
                    seconds, warm = time.monotonic() - began, True
                    for hook in self._callbacks:
                        hook.on_compile_end(stage.config, seconds)
            state.step += 1
            epoch_ends = state.step % self._steps_per_epoch == 0
            report = state.step % self._log_every == 0
            save = epoch_ends or state.step % (self._config.train.checkpoint_every_steps or self._steps_per_epoch) == 0
            if not (report or save or self._should_sync(state.step, shown)):
                continue  # without waiting for the device
            if bool(state.metrics.halted.numpy()):
                state.step = (
                    self._applied_steps(state) + left_out
                )  # steps behind one that is not finite changed nothing, like it
                state.metrics.halted.assign(False)
                self._on_nan(state)
                if state.step < stage.first:
                    return
                batches = self._batches(work, state.step)
                continue
            metrics = self._running_metrics(state, rate)
            shown = time.monotonic()
            for hook in self._callbacks:
                hook.on_progress(state.step, metrics)
                if report:
                    hook.on_log(state.step, metrics)
            if epoch_ends:
                self._end_epoch(state, metrics, work.validate)
            stops = self._runtime.processes.any_process(self._stop_requested())
            if save or stops:
                for hook in self._callbacks:
                    hook.on_checkpoint(state)
                if stops or self._runtime.processes.any_process(self._stop_requested()):
                    raise TrainingInterrupted
            if epoch_ends and self._should_stop_early(stage, state.history):
                return

    def _should_sync(self, step: int, shown: float) -> bool:
        """Whether to wait for the device behind a step: to show how far it is, or to stop."""
        if self._runtime.processes.world_size > 1:
            return step % STEPS_PER_SYNC == 0
        return self._stop_requested() or time.monotonic() - shown > SECONDS_PER_PROGRESS

    def _running_metrics(self, state: TrainState, rate: float) -> dict[str, float]:
        """The epoch's means so far."""
        sums = state.metrics.read()
        images, steps = max(sums["images"], 1.0), max(sums["steps"], 1.0)
        return {
            "train/loss": sums["loss"] / images,
            "train/accuracy": sums["correct"] / images,
            "train/gradient_norm": sums["gradient_norm"] / steps,
            "learning_rate": rate,
        }

    def _applied_steps(self, state: TrainState) -> int:
        """Steps that were applied or passed over."""
        return int(state.optimizer.iterations.numpy()) + len(state.skipped)

    def _end_epoch(
        self, state: TrainState, metrics: Mapping[str, float], validate: Callable[[], Mapping[str, float]]
    ) -> None:
        with state.averaged():
            validation = validate()
        if self._runtime.processes.world_size > 1:  # one process's rounding decides what is best and where a stage ends
            told = self._runtime.processes.broadcast_from_chief(
                lambda: {"metrics": json.dumps({**metrics, **validation}).encode()}
            )
            metrics, validation = json.loads(told["metrics"]), {}
        record = {"epoch": state.step // self._steps_per_epoch, "step": state.step, **metrics, **validation}
        state.history.append(record)
        if self._improves(record, state.best):
            state.best = record
        state.metrics.reset()
        for hook in self._callbacks:
            hook.on_epoch_end(record)

    def _improves(self, record: Mapping[str, float], best: Mapping[str, float] | None, by: float = 0.0) -> bool:
        key = f"val/{self._config.train.best_metric}"
        sign = 1 if METRICS[self._config.train.best_metric].higher_is_better else -1
        return key in record and (best is None or sign * (record[key] - best[key]) > by)

    def _should_stop_early(self, stage: TrainStage, history: Sequence[Mapping[str, float]]) -> bool:
        """Whether early stopping leaves the stage.

        A function of the history, so that a run that is resumed or goes back decides alike.
        """
        rule, best, waited = self._config.train.early_stopping, None, 0
        if rule is None:
            return False
        for record in history:
            if stage.first < record["step"] < stage.stop:
                improves = self._improves(record, best, rule.min_delta)
                best, waited = (record, 0) if improves else (best, waited + 1)
        return waited >= rule.patience

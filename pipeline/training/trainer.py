"""The training loop: stages, epochs, validation.

It does not know files or MLflow. Callbacks write checkpoints, log metrics and show the progress.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from pipeline.config.optimizer import OptimizerConfig
from pipeline.config.train import TrainConfig
from pipeline.data.data_service import with_watchdog
from pipeline.distributed.devices import Runtime
from pipeline.distributed.signals import TrainingInterrupted
from pipeline.evaluation.metrics import METRICS
from pipeline.tasks import Task
from pipeline.training.callbacks import Callback
from pipeline.training.nan_policy import learning_rate_factor, raise_nan_error
from pipeline.training.schedule import TrainSchedule, TrainStage, set_trainable
from pipeline.training.state import TrainState
from pipeline.training.train_step import TrainStep

LOGS_PER_EPOCH = 20
SECONDS_PER_PROGRESS = 0.5
STEPS_PER_SYNC = 10  # with several processes, which must check at the same steps if one of them is asked to stop


@dataclass(frozen=True)
class StageInputs:
    """The model and the data of a stage.

    Attributes:
        model: The model that the step calls: the network, or only its head if the stream yields the features of a
            frozen backbone.
        stream: Maps a step to the endless stream of global batches that starts there.
        validate: Returns the metrics of the current network on the validation split, by name; called while the network
            holds the moving average. Empty if there is no such split.
    """

    model: keras.Model
    stream: Callable[[int], tf.data.Dataset]
    validate: Callable[[], Mapping[str, float]]


class Trainer:
    """The training loop over the stages of a run."""

    def __init__(
        self,
        train: TrainConfig,
        optimizer: OptimizerConfig,
        runtime: Runtime,
        schedule: TrainSchedule,
        task: Task,
        callbacks: Sequence[Callback],
        stop_requested: Callable[[], bool],
        on_nan: Callable[[TrainState], None] = raise_nan_error,
        *,
        data_servers: Sequence[str] | None = None,
        class_weights: np.ndarray | None = None,
    ) -> None:
        """Create a trainer; nothing is compiled yet.

        Args:
            train: Section `train` of the config, resolved.
            optimizer: Section `optimizer` of the config, resolved.
            runtime: Devices, precision and processes.
            schedule: Stages and steps of the run.
            task: What labels and logits mean.
            callbacks: Called in this order.
            stop_requested: Called after every step, with several processes after every tenth; True ends the run there.
            on_nan: Called with the state before a step whose loss or gradient is not finite. It raises, or changes the
                state so that the run continues: the step is added to `skipped`, or the state goes back to an earlier
                step.
            data_servers: Addresses of the servers that prepare the batches, if any; the trainer watches them.
            class_weights: float32 (K,), the weight of each class in the loss; None if all classes weigh the same.
        """
        self._train, self._optimizer, self._runtime, self._task = train, optimizer, runtime, task
        self._callbacks, self._stop_requested, self._on_nan = callbacks, stop_requested, on_nan
        self._schedule, self._data_servers, self._class_weights = schedule, data_servers, class_weights
        self._steps_per_epoch = schedule.steps_per_epoch
        self._log_every = max(1, schedule.steps_per_epoch // LOGS_PER_EPOCH)

    def fit(self, state: TrainState, inputs_for_stage: Callable[[TrainStage], StageInputs]) -> list[dict[str, float]]:
        """Train from `state.step` to the end of the last stage.

        Args:
            state: Changed in place.
            inputs_for_stage: Returns the inputs of a stage; called at the start of a stage and on resume, after the
                trainable layers are set.

        Returns:
            The history: a record for each epoch, including those before a resume.

        Raises:
            TrainingError: The loss or its gradient is not finite. Nothing of that step was applied.
            TrainingInterrupted: A stop was requested.
        """
        while state.step < self._schedule.total_steps:
            stage = self._schedule.stage_at(state.step)
            if self._should_stop_early(stage, state.history):
                for callback in self._callbacks:
                    callback.on_early_stop((stage.stop - state.step) // self._steps_per_epoch)
                state.step = stage.stop  # later epochs have the same steps with and without early stopping
                continue
            set_trainable(state.model, stage.config)
            self._run_stage(stage, state, inputs_for_stage(stage))
        return state.history

    def _batches(self, inputs: StageInputs, start: int) -> Iterator[Any]:
        batches: Iterable[Any] = self._runtime.feed(inputs.stream(start))
        return with_watchdog(batches, self._data_servers) if self._data_servers else iter(batches)

    def make_train_step(self, stage: TrainStage, state: TrainState, model: keras.Model) -> TrainStep:
        """Return a step for a stage whose trainable layers are set.

        The step updates the moving averages of the variables that are tracked when it is compiled.
        """
        with self._runtime.strategy.scope():
            return TrainStep(
                model,
                state.optimizer,
                state.ema,
                state.metrics,
                self._train,
                self._schedule.global_batch_size,
                self._optimizer,
                self._runtime,
                self._task,
                layer_decay=stage.config.layer_decay,
                class_weights=self._class_weights,
            )

    def _run_stage(self, stage: TrainStage, state: TrainState, inputs: StageInputs) -> None:
        train_step, compiled = self.make_train_step(stage, state, inputs.model), False
        omitted_steps = state.step - self._applied_steps(state)  # by early stopping of previous stages
        last_progress = time.monotonic()
        batches = self._batches(inputs, state.step)
        while state.step < stage.stop:
            batch, rate = next(batches), stage.learning_rate(state.step - stage.first) * learning_rate_factor(state)
            if state.step not in state.skipped:
                start = time.monotonic()
                train_step(batch, rate)
                if not compiled:
                    state.metrics.read()  # waits for the device
                    seconds, compiled = time.monotonic() - start, True
                    for callback in self._callbacks:
                        callback.on_compile_end(stage.config, seconds)
            state.step += 1
            epoch_ends = state.step % self._steps_per_epoch == 0
            log = state.step % self._log_every == 0
            save = epoch_ends or state.step % (self._train.checkpoint_every_steps or self._steps_per_epoch) == 0
            if not (log or save or self._should_sync(state.step, last_progress)):
                continue  # without waiting for the device
            if bool(state.metrics.halted.numpy()):
                # Neither the step that was not finite nor the steps after it have changed anything.
                state.step = self._applied_steps(state) + omitted_steps
                state.metrics.halted.assign(False)
                self._on_nan(state)
                if state.step < stage.first:
                    return
                batches = self._batches(inputs, state.step)
                continue
            metrics = self._running_metrics(state, rate)
            last_progress = time.monotonic()
            for callback in self._callbacks:
                callback.on_progress(state.step, metrics)
                if log:
                    callback.on_log(state.step, metrics)
            if epoch_ends:
                self._end_epoch(state, metrics, inputs.validate)
            stops = self._runtime.processes.any_process(self._stop_requested())
            if save or stops:
                for callback in self._callbacks:
                    callback.on_checkpoint(state)
                if stops or self._runtime.processes.any_process(self._stop_requested()):
                    raise TrainingInterrupted
            if epoch_ends and self._should_stop_early(stage, state.history):
                return

    def _should_sync(self, step: int, last_progress: float) -> bool:
        """Return True if the loop waits for the device after a step, to show the progress or to stop."""
        if self._runtime.processes.world_size > 1:
            return step % STEPS_PER_SYNC == 0
        return self._stop_requested() or time.monotonic() - last_progress > SECONDS_PER_PROGRESS

    def _running_metrics(self, state: TrainState, rate: float) -> dict[str, float]:
        """Return the means over the epoch so far."""
        sums = state.metrics.read()
        images, steps = max(sums["images"], 1.0), max(sums["steps"], 1.0)
        return {
            "train/loss": sums["loss"] / images,
            "train/accuracy": sums["correct"] / images,
            "train/gradient_norm": sums["gradient_norm"] / steps,
            "learning_rate": rate,
        }

    def _applied_steps(self, state: TrainState) -> int:
        """Return the number of steps that were applied or skipped."""
        return int(state.optimizer.iterations.numpy()) + len(state.skipped)

    def _end_epoch(
        self, state: TrainState, metrics: Mapping[str, float], validate: Callable[[], Mapping[str, float]]
    ) -> None:
        with state.averaged():
            validation = validate()
        if self._runtime.processes.world_size > 1:
            # Rounding differs between processes; the chief's metrics decide about the best epoch and early stopping.
            received = self._runtime.processes.broadcast_from_chief(
                lambda: {"metrics": json.dumps({**metrics, **validation}).encode()}
            )
            metrics, validation = json.loads(received["metrics"]), {}
        record = {"epoch": state.step // self._steps_per_epoch, "step": state.step, **metrics, **validation}
        state.history.append(record)
        if self._improves(record, state.best):
            state.best = record
        state.metrics.reset()
        for callback in self._callbacks:
            callback.on_epoch_end(record)

    def _improves(self, record: Mapping[str, float], best: Mapping[str, float] | None, min_delta: float = 0.0) -> bool:
        key = f"val/{self._train.best_metric}"
        sign = 1 if METRICS[self._train.best_metric].higher_is_better else -1
        return key in record and (best is None or sign * (record[key] - best[key]) > min_delta)

    def _should_stop_early(self, stage: TrainStage, history: Sequence[Mapping[str, float]]) -> bool:
        """Return True if early stopping ends the stage.

        The decision depends on the history alone, so that it is the same after a resume or a rollback.
        """
        rule, best, waited = self._train.early_stopping, None, 0
        if rule is None:
            return False
        for record in history:
            if stage.first < record["step"] < stage.stop:
                improves = self._improves(record, best, rule.min_delta)
                best, waited = (record, 0) if improves else (best, waited + 1)
        return waited >= rule.patience

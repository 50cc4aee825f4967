"""The reaction of a run to a step whose loss or gradient is not finite, as set by `train.on_nan`.

Nothing of such a step is applied. Its batch, as fed to the model, and the state before the step are saved for
inspection. If the model is fed the features of a frozen backbone, the images are saved instead. Then the run

- stops (`stop`),
- continues with the next batch (`{skip: N}`, for an occasional bad batch), at most N times,
- or returns to the checkpoint at the start of the epoch and halves the learning rate from there on (`rollback`, for a
  run that diverges: the weights are unusable some steps before the loss overflows), at most three times.

Everything depends on the state alone, so that a run that is killed in between does the same when it is resumed.
"""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import tensorflow as tf

from pipeline.config.train import SkipNanConfig
from pipeline.console import plural
from pipeline.distributed.process_group import ProcessGroup
from pipeline.errors import TrainingError
from pipeline.training import checkpoint
from pipeline.training.state import TrainState

MAX_ROLLBACKS = 3
ADVICE = "Try a lower optimizer.base_lr, a longer optimizer.warmup_epochs, or runtime.precision=float32."


def raise_nan_error(state: TrainState, details: str = "") -> NoReturn:
    """Raise the error that ends the run.

    Args:
        state: State before the step.
        details: Text to append to the message.

    Raises:
        TrainingError: Always.
    """
    raise TrainingError(f"{_message(state)} {ADVICE}{details}")


def learning_rate_factor(state: TrainState) -> float:
    """Return the factor of the learning rate: it is halved by each rollback."""
    return 0.5**state.rollbacks


class NanPolicy:
    """The reaction to steps that are not finite. Its instance is called with the state before such a step."""

    def __init__(
        self,
        policy: Literal["stop", "rollback"] | SkipNanConfig,
        folder: Path,
        checkpoints: Path,
        identity: Mapping[str, Any],
        training_stream: Callable[[int], tf.data.Dataset],
        log: Callable[[str], None],
        processes: ProcessGroup,
    ) -> None:
        """Create the policy of a run.

        Args:
            policy: Value of `train.on_nan`.
            folder: Folder for batches and states, each in `step-<number of the bad step, from 1>`.
            checkpoints: Folder of the run's checkpoints.
            identity: Values in which a resumed run must agree with a checkpoint, as in `checkpoint.save`.
            training_stream: Maps a step to the stream of global batches that starts there.
            log: Prints a line for the user.
            processes: Processes of the run, of which the chief writes.
        """
        self._policy, self._folder, self._checkpoints, self._identity = policy, folder, checkpoints, identity
        self._training_stream, self._log, self._processes = training_stream, log, processes

    def prepare(self, state: TrainState) -> None:
        """Write a checkpoint before the first step, so that a rollback is possible in the first epoch."""
        if self._policy == "rollback" and state.step == 0 and self._processes.is_chief:
            checkpoint.write(state, checkpoint.checkpoint_path(self._checkpoints, 0), self._identity)

    def __call__(self, state: TrainState) -> None:
        """Change the state so that the run can continue.

        Args:
            state: State before the step that is not finite.

        Raises:
            TrainingError: The run ends.
        """
        saved = self._save_step(state)
        if isinstance(self._policy, SkipNanConfig) and len(state.skipped) < self._policy.skip:
            self._log(
                f"{_message(state)} Skipped, {len(state.skipped) + 1} of at most {self._policy.skip} steps. {saved}"
            )
            state.skipped.append(state.step)
        elif self._policy == "rollback" and state.rollbacks < MAX_ROLLBACKS:
            self._roll_back(state, saved)
        else:
            if self._policy == "stop":
                details = ""
            elif self._policy == "rollback":
                details = f"\nThe run has already been rolled back {plural(state.rollbacks, 'time')}."
            else:
                details = f"\n{plural(len(state.skipped), 'step has', 'steps have')} already been skipped."
            raise_nan_error(
                state,
                f"{details}\n{saved} Continue with --resume and --allow-change of the keys that you change, or with "
                "another train.on_nan.",
            )

    def _roll_back(self, state: TrainState, saved: str) -> None:
        message, rollbacks, changes = _message(state), state.rollbacks + 1, state.changes
        start = checkpoint.checkpoint_path(self._checkpoints, state.epoch_start)
        problem = checkpoint.verify_checkpoint(start) if self._processes.is_chief else None
        if self._processes.any_process(problem is not None):
            raise_nan_error(
                state, f"\n{saved} The run cannot go back to {start}: {problem or 'the chief reports why'}."
            )
        checkpoint.restore(state, start, self._processes)
        if self._processes.is_chief:
            checkpoint.delete_checkpoints_after(self._checkpoints, state.step)
        state.rollbacks, state.changes = rollbacks, changes  # these are newer than the checkpoint
        self._log(
            f"{message} Rolled back to the end of step {state.step:,} with half the learning rate, "
            f"{rollbacks} of at most {MAX_ROLLBACKS} times. {saved}"
        )

    def _save_step(self, state: TrainState) -> str:
        """Save the batch and the state, and return a sentence for the user that says where."""
        if not self._processes.is_chief:
            return "The chief saves its batch and the state before it."
        batch = next(iter(self._training_stream(state.step).take(1)))
        content = io.BytesIO()
        np.savez_compressed(
            content,
            **dict(zip(("images", "labels", "weights", "index"), (part.numpy() for part in batch), strict=True)),
        )
        try:
            folder = checkpoint.write(
                state,
                checkpoint.checkpoint_path(self._folder, state.step + 1),
                self._identity,
                extra_files={"batch.npz": content.getvalue()},
            )
        except TrainingError as error:  # it must not hide the error of the step
            return f"Its batch and the state before it could not be saved: {error}."
        return f"Its batch and the state before it are in {folder}."


def _message(state: TrainState) -> str:
    return f"the loss or its gradient is not finite in step {state.step + 1}; nothing of that step was applied."

"""What becomes of a run when the loss or the gradient of a step is not finite: `train.on_nan` decides.

Nothing of such a step was applied. Its batch, as it was fed (of a frozen backbone's features, the pictures that they
are of), and the state in front of it are saved for inspection. Then the run

- stops (`stop`),
- or goes on with the next batch (`{skip: N}`, for a bad batch now and then), N times at most,
- or goes back to the checkpoint at the start of the epoch with the learning rate halved from there on (`rollback`, for
  a run that diverges: shortly before the bad step the weights are spoilt already), three times at most.

All of it is a function of the state, so a run that is killed in between does the same again when it is resumed.
"""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import tensorflow as tf

from pipeline.config.schema import Config
from pipeline.config.train import SkipNanConfig
from pipeline.distributed.process_group import ProcessGroup
from pipeline.errors import TrainingError
from pipeline.training import checkpoint
from pipeline.training.state import TrainState

MAX_ROLLBACKS = 3
ADVICE = "Try a lower optimizer.base_lr, a longer optimizer.warmup_epochs, or runtime.precision=float32."


def raise_nan_error(state: TrainState, further: str = "") -> NoReturn:
    """End the run.

    Args:
        state: In front of the step.
        further: What else there is to know.

    Raises:
        TrainingError: Always.
    """
    raise TrainingError(f"{_finding(state)} {ADVICE}{further}")


def learning_rate_factor(state: TrainState) -> float:
    """What the rollbacks so far leave of the learning rate."""
    return 0.5**state.rollbacks


class NanPolicy:
    """Does what the config says."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        checkpoints: Path,
        identity: Mapping[str, Any],
        training_stream: Callable[[int], tf.data.Dataset],
        log: Callable[[str], None],
        processes: ProcessGroup | None = None,
    ) -> None:
        """Take what it needs of the run.

        Args:
            config: `train.on_nan` is used.
            folder: Where batches and states are saved, each in `step-<number of the bad step, from 1>`.
            checkpoints: The run's.
            identity: As of `checkpoint.save`.
            training_stream: The stream of global batches from a step on.
            say: Tells the user.
            processes: Those of the run, the chief of which writes; None for this one alone.
        """
        self._processes = processes or ProcessGroup()
        self._policy, self._folder, self._checkpoints, self._identity = (
            config.train.on_nan,
            folder,
            checkpoints,
            identity,
        )
        self._training_stream, self._log = training_stream, log

    def prepare(self, state: TrainState) -> None:
        """Sees to it that there is something to go back to in the first epoch, too."""
        if self._policy == "rollback" and state.step == 0 and self._processes.is_chief:
            checkpoint.write(state, checkpoint.checkpoint_path(self._checkpoints, 0), self._identity)

    def __call__(self, state: TrainState) -> None:
        """Leaves the state where the run should go on.

        Args:
            state: In front of the step that is not finite.

        Raises:
            TrainingError: If the run should not go on.
        """
        where = self._save_step(state)
        if isinstance(self._policy, SkipNanConfig) and len(state.skipped) < self._policy.skip:
            self._log(
                f"{_finding(state)} Passed over, {len(state.skipped) + 1} of {self._policy.skip} times at most. {where}"
            )
            state.skipped.append(state.step)
        elif self._policy == "rollback" and state.rollbacks < MAX_ROLLBACKS:
            self._roll_back(state, where)
        else:
            spent = {"stop": "", "rollback": f"\nThe run went back {state.rollbacks} times already."}
            further = (
                spent[self._policy]
                if isinstance(self._policy, str)
                else f"\n{len(state.skipped)} steps were passed over already."
            )
            raise_nan_error(
                state,
                f"{further}\n{where} Go on with --resume and --allow-change of what you change, or with another train.on_nan.",
            )

    def _roll_back(self, state: TrainState, where: str) -> None:
        finding, rollbacks, changes = _finding(state), state.rollbacks + 1, state.changes
        start = checkpoint.checkpoint_path(self._checkpoints, state.epoch_start)
        problem = checkpoint.verify_checkpoint(start) if self._processes.is_chief else None
        if self._processes.any_process(problem is not None):
            raise_nan_error(
                state, f"\n{where} The run cannot go back to {start}: {problem or 'the first process says why'}."
            )
        checkpoint.restore(state, start, self._processes)
        if self._processes.is_chief:
            checkpoint.delete_checkpoints_after(self._checkpoints, state.step)
        state.rollbacks, state.changes = rollbacks, changes  # what the checkpoint is too old to know
        times = f"{rollbacks} of {MAX_ROLLBACKS} times at most"
        self._log(f"{finding} Back to the end of step {state.step:,}, the learning rate halved, {times}. {where}")

    def _save_step(self, state: TrainState) -> str:
        """Save the batch and the state; returns a sentence for the user."""
        if not self._processes.is_chief:
            return "The first process saves its batch and the state in front of it."
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
        except TrainingError as error:  # it must not hide what it was to be saved for
            return f"Its batch and the state in front of it could not be saved: {error}."
        return f"Its batch and the state in front of it are in {folder}."


def _finding(state: TrainState) -> str:
    return f"the loss or its gradient is not finite in step {state.step + 1}; nothing of that step was applied."

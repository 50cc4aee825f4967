"""What a training loop tells those who want to know of it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.config.train import StageConfig
    from pipeline.training.state import TrainState


class Callback:
    """A listener that hears nothing. Each method is called between steps, for all hooks in the order of their list."""

    def on_compile_end(self, stage: "StageConfig", seconds: float) -> None:
        """After the first step that this process takes of a stage, with its seconds.

        Tracing, compilation and the step.
        """

    def on_progress(self, step: int, metrics: Mapping[str, float]) -> None:
        """About twice a second, with the means of the epoch so far."""

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """At fixed steps, some twenty in an epoch, with the means of the epoch so far."""

    def on_epoch_end(self, record: Mapping[str, float]) -> None:
        """After each epoch and its validation, with its record."""

    def on_early_stop(self, epochs: int) -> None:
        """When early stopping leaves a stage, with the number of epochs that it leaves out.

        Also behind a resume or a rollback.
        """

    def on_checkpoint(self, state: "TrainState") -> None:
        """When the state should be kept.

        After each epoch, at the steps that the config names, and before the run is interrupted.
        """

"""The interface through which the training loop reports its progress."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.config.train import StageConfig
    from pipeline.training.state import TrainState


class Callback:
    """A callback that does nothing.

    Each method is called between two steps, for all callbacks in the order of their list.
    """

    def on_compile_end(self, stage: "StageConfig", seconds: float) -> None:
        """Handle the end of the first step that this process takes in a stage.

        Args:
            stage: The stage.
            seconds: Duration of tracing, compilation and the step.
        """

    def on_progress(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the means over the epoch so far; called about twice a second."""

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the means over the epoch so far; called at fixed steps, about twenty in an epoch."""

    def on_epoch_end(self, record: Mapping[str, float]) -> None:
        """Handle the record of an epoch, after its validation."""

    def on_early_stop(self, epochs: int) -> None:
        """Handle the end of a stage by early stopping; called again after a resume or a rollback.

        Args:
            epochs: Number of epochs of the stage that are omitted.
        """

    def on_checkpoint(self, state: "TrainState") -> None:
        """Save the state.

        Called after each epoch, at the steps that the config names, and before the run is interrupted.
        """

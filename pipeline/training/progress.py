"""A run's progress on the screen."""

import time
from collections.abc import Mapping

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.config.train import StageConfig
from pipeline.console import Console
from pipeline.training.callbacks import Callback


class ProgressBar(Callback):
    """Show a run's progress: in a terminal one line that moves, elsewhere a line for each epoch."""

    def __init__(
        self, console: Console, *, first_step: int, total_steps: int, steps_per_epoch: int, global_batch_size: int
    ) -> None:
        """Prepare the line.

        Args:
            screen: Where to show it.
            first_step: Steps taken before this process started.
            total_steps: Steps of the whole run.
            steps_per_epoch: Steps between two validations.
            global_batch_size: Images of a step.
        """
        self._console, self._steps_per_epoch, self._total, self._batch = (
            console,
            steps_per_epoch,
            total_steps,
            global_batch_size,
        )
        self._epochs = total_steps // steps_per_epoch
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console.rich, transient=True, speed_estimate_period=60)
        self._task = self._progress.add_task(
            "preparing the first step", total=total_steps, completed=first_step, figures=""
        )
        self._rate = Throughput()

    def __enter__(self) -> "ProgressBar":
        if self._console.rich.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._console.rich.is_terminal:
            self._progress.stop()

    def on_progress(self, step: int, metrics: Mapping[str, float]) -> None:
        """Move the line."""
        speed = self._rate.update(step) * self._batch
        epoch = min((step - 1) // self._steps_per_epoch + 1, self._epochs)
        figures = f"loss {metrics['train/loss']:.3f}  accuracy {metrics['train/accuracy']:.1%}  {speed:,.0f} images/s"
        self._progress.update(self._task, description=f"epoch {epoch}/{self._epochs}", completed=step, figures=figures)

    def on_compile_end(self, stage: StageConfig, seconds: float) -> None:
        """Says what the run waited for."""
        self._console.print(f"first step {format_duration(seconds)}, tracing and compilation included")

    def on_epoch_end(self, record: Mapping[str, float]) -> None:
        """Leaves a line for the epoch."""
        step = int(record["step"])
        text = f"epoch {record['epoch']:>3}/{self._epochs}  loss {record['train/loss']:.3f}  accuracy {record['train/accuracy']:.1%}"
        if "val/loss" in record:
            text += f"  |  validation loss {record['val/loss']:.3f}  accuracy {record['val/accuracy']:.1%}"
        left = self._rate.seconds_left(self._total - step)
        if self._rate.mean:
            text += f"  |  {self._rate.mean * self._batch:,.0f} images/s" + (
                f", {format_duration(left)} left" if step < self._total else ""
            )
        self._console.print(text)
        self._rate = Throughput()  # the next epoch may be another stage's, with another speed

    def on_early_stop(self, epochs: int) -> None:
        """Says so."""
        self._console.print(f"no improvement any more: the stage ends, its last {epochs} epochs are left out")


class Throughput:
    """Steps per second since the first call of `at`; that one waits for the compilation, which does not count."""

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None
        self._last = 0
        self.mean = 0.0

    def update(self, step: int) -> float:
        """Notes that `step` steps are done; returns the mean. A run that went back to an earlier step begins anew."""
        now = time.monotonic()
        if self._first is None or step < self._last:
            self._first = (step, now)
        else:
            self.mean = (step - self._first[0]) / (now - self._first[1])
        self._last = step
        return self.mean

    def seconds_left(self, steps: int) -> float:
        """Time that `steps` will take at the mean."""
        return steps / self.mean if self.mean else 0.0


def format_duration(seconds: float) -> str:
    """Seconds in words, to the second."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"

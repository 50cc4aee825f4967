"""The progress of a run on the console."""

import time
from collections.abc import Mapping

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipeline.config.train import StageConfig
from pipeline.console import Console, format_duration, plural
from pipeline.training.callbacks import Callback


class ProgressBar(Callback):
    """A progress bar in a terminal; elsewhere a line for each epoch."""

    def __init__(
        self, console: Console, *, first_step: int, total_steps: int, steps_per_epoch: int, global_batch_size: int
    ) -> None:
        """Create the bar; it is shown inside a `with` block.

        Args:
            console: Console to print to.
            first_step: Number of steps taken before this process started.
            total_steps: Number of steps of the run.
            steps_per_epoch: Number of steps between two validations.
            global_batch_size: Images per step.
        """
        self._console, self._steps_per_epoch = console, steps_per_epoch
        self._total_steps, self._batch_size = total_steps, global_batch_size
        self._epochs = total_steps // steps_per_epoch
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            TextColumn("{task.fields[metrics]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console.rich, transient=True, speed_estimate_period=60)
        self._task = self._progress.add_task(
            "preparing the first step", total=total_steps, completed=first_step, metrics=""
        )
        self._throughput = Throughput()
        self._has_header = False

    def __enter__(self) -> "ProgressBar":
        """Show the bar, in a terminal."""
        if self._console.shows_progress:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove the bar."""
        if self._console.shows_progress:
            self._progress.stop()

    def on_progress(self, step: int, metrics: Mapping[str, float]) -> None:
        """Update the bar."""
        speed = self._throughput.update(step) * self._batch_size
        epoch = min((step - 1) // self._steps_per_epoch + 1, self._epochs)
        text = f"loss {metrics['train/loss']:.3f}  {metrics['train/accuracy']:.1%}"
        text += f"  {speed:,.0f} images/s" if speed else ""  # there is none at the first step of an epoch
        self._progress.update(self._task, description=f"epoch {epoch}/{self._epochs}", completed=step, metrics=text)

    def on_compile_end(self, stage: StageConfig, seconds: float) -> None:
        """Print the duration of the first step."""
        self._console.print(f"first step {format_duration(seconds)}, including tracing and compilation")

    def on_epoch_end(self, record: Mapping[str, float]) -> None:
        """Print a line for the epoch, with a header above the first one. It fits 80 columns."""
        steps_left = self._total_steps - int(record["step"])
        speed = self._throughput.mean
        cells = {
            "": f"epoch {record['epoch']:>{len(str(self._epochs))}}/{self._epochs}",
            "  loss": f"{record['train/loss']:.3f}",
            "accuracy": f"{record['train/accuracy']:.1%}",
        }
        if "val/loss" in record:
            cells |= {"val loss": f"{record['val/loss']:.3f}", "val accuracy": f"{record['val/accuracy']:.1%}"}
        cells |= {
            "images/s": f"{speed * self._batch_size:,.0f}" if speed else "",
            "   time left": format_duration(self._throughput.seconds_left(steps_left)) if speed and steps_left else "",
        }
        if not self._has_header:
            self._has_header = True
            self._console.print("  ".join(f"{title:>{len(cells[title])}}" for title in cells))
        self._console.print("  ".join(f"{cell:>{len(title)}}" for title, cell in cells.items()).rstrip())
        self._throughput = Throughput()  # the next epoch may belong to another stage, which has another speed

    def on_early_stop(self, epochs: int) -> None:
        """Print that the stage ends."""
        self._console.print(
            f"early stopping: no improvement; the last {plural(epochs, 'epoch')} of the stage are omitted"
        )


class Throughput:
    """Steps per second since the first call of `update`, which waits for the compilation and is not counted.

    Attributes:
        mean: Steps per second; 0 before the second call.
    """

    def __init__(self) -> None:
        """Create a measurement without steps."""
        self._first: tuple[float, float] | None = None
        self._last = 0
        self.mean = 0.0

    def update(self, step: int) -> float:
        """Record that `step` steps are done, and return the mean. After a rollback the measurement starts again."""
        now = time.monotonic()
        if self._first is None or step < self._last:
            self._first = (step, now)
        else:
            self.mean = (step - self._first[0]) / (now - self._first[1])
        self._last = step
        return self.mean

    def seconds_left(self, steps: int) -> float:
        """Return the time that `steps` take at the mean speed."""
        return steps / self.mean if self.mean else 0.0

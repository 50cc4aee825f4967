"""What a person sees: progress, summaries and errors. What the libraries say goes to the run's log instead."""

import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.errors import TrainingError, UserError


class Screen:
    """The terminal, kept for the program's own words.

    Once `divert_to` is called, everything that is written to standard output or standard error by anybody else, compiled libraries
    included, goes to a file: they write to the file descriptors, so it is those that are redirected.
    """

    def __init__(self) -> None:
        self._out: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
        self._err: TextIO = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace")
        self.console = Console(file=self._out, highlight=False, soft_wrap=not self._out.isatty())
        self.log: Path | None = None

    def divert_to(self, log: Path | None) -> None:
        """Sends the libraries' output to the end of `log`, or nowhere if it is None."""
        sys.stdout.flush()
        sys.stderr.flush()
        with Path(log or os.devnull).open("ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        self.log = log
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0")
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", force=True)
        logging.captureWarnings(True)
        warnings.simplefilter("default")

    def say(self, text: Any = "", *, details: str | None = None) -> None:
        """Shows a line of text or one of rich's renderables; a line goes to the log, too, or its details in its place."""
        self.console.print(text, markup=False, emoji=False)
        if isinstance(text, str) and self.log is not None:
            logging.getLogger("pipeline").info("%s", details or text)

    @contextmanager
    def counting(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Shows how far something has come; inside the block, call what is given with the number done and of all."""
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.completed:,.0f} of {task.total:,.0f}"))
        with Progress(
            *columns, TimeRemainingColumn(), console=self.console, transient=True, disable=not self.console.is_terminal
        ) as progress:
            task = progress.add_task(what, total=1)
            yield lambda done, of: progress.update(task, completed=done, total=of)

    def error(self, text: str) -> None:
        """Shows an error."""
        self._out.flush()
        print(text, file=self._err, flush=True)
        if self.log is not None:
            logging.getLogger("pipeline").error("%s", text)


def run_program(program: Callable[[Screen], int]) -> int:
    """Runs a program and turns what it raises into a message and an exit code: 2 for bad input, 1 for a failure.

    SIGTERM unwinds it as Ctrl-C does, so that what it has open is closed.
    """
    screen = Screen()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return program(screen)
    except UserError as error:
        screen.error(f"error: {error}")
        return 2
    except TrainingError as error:
        screen.error(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        screen.error("interrupted")
        return 130
    except Exception as error:
        details = traceback.format_exc()
        where = f"the details are in {screen.log}" if screen.log else details
        screen.error(f"unexpected {type(error).__name__}: {error}\n{where}")
        if screen.log is not None:
            logging.getLogger("pipeline").error("%s", details)
        return 1


class ProgressLine:
    """Shows a run's progress: in a terminal one line that moves, elsewhere a line for each epoch."""

    def __init__(self, screen: Screen, *, first_step: int, total_steps: int, steps_per_epoch: int, global_batch_size: int) -> None:
        """Prepares the line.

        Args:
            screen: Where to show it.
            first_step: Steps taken before this process started.
            total_steps: Steps of the whole run.
            steps_per_epoch: Steps between two validations.
            global_batch_size: Images of a step.
        """
        self._screen, self._steps_per_epoch, self._total, self._batch = screen, steps_per_epoch, total_steps, global_batch_size
        self._epochs = total_steps // steps_per_epoch
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[figures]}"), TimeRemainingColumn())
        self._progress = Progress(*columns, console=screen.console, transient=True, speed_estimate_period=60)
        self._task = self._progress.add_task("preparing the first step", total=total_steps, completed=first_step, figures="")
        self._rate = Throughput()

    def __enter__(self) -> "ProgressLine":
        if self._screen.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._screen.console.is_terminal:
            self._progress.stop()

    def on_progress(self, step: int, metrics: Mapping[str, float]) -> None:
        """Moves the line."""
        speed = self._rate.at(step) * self._batch
        epoch = min((step - 1) // self._steps_per_epoch + 1, self._epochs)
        figures = f"loss {metrics['train/loss']:.3f}  accuracy {metrics['train/accuracy']:.1%}  {speed:,.0f} images/s"
        self._progress.update(self._task, description=f"epoch {epoch}/{self._epochs}", completed=step, figures=figures)

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing: the line moves by time, not by steps."""

    def on_epoch(self, record: Mapping[str, float]) -> None:
        """Leaves a line for the epoch."""
        step = int(record["step"])
        text = f"epoch {record['epoch']:>3}/{self._epochs}  loss {record['train/loss']:.3f}  accuracy {record['train/accuracy']:.1%}"
        if "val/loss" in record:
            text += f"  |  validation loss {record['val/loss']:.3f}  accuracy {record['val/accuracy']:.1%}"
        left = self._rate.seconds_left(self._total - step)
        if self._rate.mean:
            text += f"  |  {self._rate.mean * self._batch:,.0f} images/s" + (f", {_duration(left)} left" if step < self._total else "")
        self._screen.say(text)
        self._rate = Throughput()  # the next epoch may be another stage's, with another speed

    def on_checkpoint(self, state: object) -> None:
        """Nothing."""


class Throughput:
    """Steps per second since the first call of `at`; that one waits for the compilation, which does not count."""

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None
        self.mean = 0.0

    def at(self, step: int) -> float:
        """Notes that `step` steps are done; returns the mean."""
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        else:
            self.mean = (step - self._first[0]) / (now - self._first[1])
        return self.mean

    def seconds_left(self, steps: int) -> float:
        """Time that `steps` will take at the mean."""
        return steps / self.mean if self.mean else 0.0


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"

"""What a person sees: progress, summaries and errors. What the libraries say goes to the run's log instead."""

import logging
import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich import console as rich_console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from pipeline.errors import TrainingError, UserError


class Console:
    """The terminal, kept for the program's own words.

    Once `divert_to` is called, everything that is written to standard output or standard error by anybody else, compiled libraries
    included, goes to a file: they write to the file descriptors, so it is those that are redirected.
    """

    def __init__(self) -> None:
        self._out: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
        self._err: TextIO = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace")
        self.console = rich_console.Console(file=self._out, highlight=False, soft_wrap=not self._out.isatty())
        self.log: Path | None = None

    def redirect_library_output(self, log: Path | None) -> None:
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

    def reserve_stdout(self) -> TextIO:
        """Gives standard output to rows for other programs. What is said from now on goes to standard error, and no bar is shown."""
        self.console = rich_console.Console(file=self._err, highlight=False, soft_wrap=True, force_terminal=False)
        return self._out

    def print(self, text: Any = "", *, details: str | None = None) -> None:
        """Shows a line of text or one of rich's renderables; a line goes to the log, too, or its details in its place."""
        self.console.print(text, markup=False, emoji=False)
        if isinstance(text, str) and self.log is not None:
            logging.getLogger("pipeline").info("%s", details or text)

    @contextmanager
    def progress(self, what: str) -> Iterator[Callable[[int, int | None], None]]:
        """Shows how far something has come; inside the block, call what is given with the number done and of all, None if not known."""
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), _Count(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            task = progress.add_task(what, total=None)
            yield lambda done, of: progress.update(task, completed=done, total=of)

    def error(self, text: str) -> None:
        """Shows an error."""
        self._out.flush()
        if self.console.is_terminal and self._err.isatty():
            self.console.print(
                text, markup=False, emoji=False
            )  # which of the two does not show on a terminal; this one knows of the bar
        else:
            print(text, file=self._err, flush=True)
        if self.log is not None:
            logging.getLogger("pipeline").error("%s", text)


class _Count(ProgressColumn):
    """The number done and of all; where that is not known, and no remaining time is to be had, how many come in a second."""

    def render(self, task: Task) -> Text:
        return Text(
            f"{task.completed:,.0f}"
            + (f", {task.speed or 0:,.0f} a second" if task.total is None else f" of {task.total:,.0f}")
        )


def python_executable() -> str:
    """The interpreter that runs this, as a word of a command to be typed in the current folder."""
    here = Path(sys.executable)
    return shlex.quote(os.path.relpath(here) if here.is_relative_to(Path.cwd()) else str(here))


def run_cli(program: Callable[[Console], int]) -> int:
    """Runs a program and turns what it raises into a message and an exit code: 2 for bad input, 1 for a failure.

    SIGTERM unwinds it as Ctrl-C does, so that what it has open is closed.
    """
    screen = Console()
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

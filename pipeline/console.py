"""The terminal: progress, summaries and errors of the program. The output of the libraries goes to the run's log.

With EFFICIENTNET_DEBUG=1 in the environment nothing is redirected: print(), breakpoint(), the libraries' output and the
tracebacks of unexpected exceptions appear in the terminal, and there are no progress bars.
"""

import errno
import logging
import os
import shlex
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich import console as rich_console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from pipeline.errors import TrainingError, UserError

DEBUG = "EFFICIENTNET_DEBUG"
ProgressFn = Callable[[int, int | None], None]  # called with the number done and the total, None if it is not known


def is_debugging() -> bool:
    """Return True if the environment variable EFFICIENTNET_DEBUG is 1."""
    return os.environ.get(DEBUG) == "1"


class Console:
    """The terminal, reserved for the program's own output.

    After `redirect_library_output`, everything else that is written to standard output or standard error, by compiled
    libraries too, goes to a file: they write to the file descriptors, so the file descriptors are redirected.

    Attributes:
        rich: The rich console that prints.
        log_path: The log file; None if there is none.
    """

    def __init__(self) -> None:
        """Duplicate standard output and standard error, for output that no redirection affects."""
        self._out: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
        self._err: TextIO = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace")
        self.rich = rich_console.Console(file=self._out, highlight=False, soft_wrap=not self._out.isatty())
        self.log_path: Path | None = None

    def redirect_library_output(self, log: Path | None) -> None:
        """Append the libraries' output to the file `log`, or discard it if `log` is None. Do nothing when debugging."""
        if is_debugging():
            return
        sys.stdout.flush()
        sys.stderr.flush()
        with Path(log or os.devnull).open("ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        self.log_path = log
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0")
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", force=True)
        logging.captureWarnings(True)
        warnings.simplefilter("default")

    def reserve_stdout(self) -> TextIO:
        """Reserve standard output for data and return it.

        From now on messages go to standard error, without progress bars.
        """
        self.rich = rich_console.Console(file=self._err, highlight=False, soft_wrap=True, force_terminal=False)
        return self._out

    def print(self, text: Any = "", *, details: str | None = None, wrap: bool = True) -> None:
        """Print a line of text or a rich renderable. A line is also written to the log, or `details` in its place.

        Args:
            text: The line or the renderable.
            details: The text for the log.
            wrap: Break a line that is longer than the terminal is wide; False for one with a path or a command, which
                would no longer work when it is copied.
        """
        self.rich.print(text, markup=False, emoji=False, soft_wrap=None if wrap else True)
        if isinstance(text, str) and self.log_path is not None:
            logging.getLogger("pipeline").info("%s", details or text)

    @property
    def shows_progress(self) -> bool:
        """True if there are progress bars: in a terminal, and not when debugging."""
        return self.rich.is_terminal and not is_debugging()

    @contextmanager
    def progress(self, description: str) -> Iterator[ProgressFn]:
        """Show a progress bar during the block.

        The block receives a function and calls it with the number done and the total, None if that is not known.
        """
        columns = (BarColumn(bar_width=20), _Count(), TimeElapsedColumn(), TimeRemainingColumn())
        with self._live(*columns) as progress:
            task = progress.add_task(description, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)

    @contextmanager
    def waiting(self, description: str) -> Iterator[None]:
        """Show a description with the time elapsed during the block, in a terminal."""
        with self._live(SpinnerColumn(), TimeElapsedColumn()) as progress:
            progress.add_task(description, total=None)
            yield

    def _live(self, *columns: ProgressColumn) -> Progress:
        """Return the display of a task: its description and columns, removed at the end; nothing without a terminal.

        rich would replace sys.stdout and sys.stderr meanwhile. A library that is imported then would keep the
        replacement and write to the terminal from there on.
        """
        return Progress(
            TextColumn("{task.description}"),
            *columns,
            console=self.rich,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not self.shows_progress,
        )

    def error(self, text: str) -> None:
        """Print an error, and write it to the log."""
        self._out.flush()
        if self.rich.is_terminal and self._err.isatty():
            # Above a progress bar, which standard error would break.
            self.rich.print(text, markup=False, emoji=False, soft_wrap=True)
        else:
            print(text, file=self._err, flush=True)
        if self.log_path is not None:
            logging.getLogger("pipeline").error("%s", text)


class _Count(ProgressColumn):
    """The number done and the total; without a total, the number done and the rate per second."""

    def render(self, task: Task) -> Text:
        """Return the text of the column."""
        return Text(
            f"{task.completed:,.0f}"
            + (f", {task.speed or 0:,.0f} a second" if task.total is None else f" of {task.total:,.0f}")
        )


def python_executable() -> str:
    """Return the path of the running Python interpreter.

    Relative if it is below the current folder, quoted for a shell.
    """
    here = Path(sys.executable)
    return shlex.quote(os.path.relpath(here) if here.is_relative_to(Path.cwd()) else str(here))


def install_command(extra: str) -> str:
    """Return the command that installs an extra of pyproject.toml into the running Python."""
    return f"{python_executable()} -m pip install --constraint constraints.txt '.[{extra}]'"


def command_line(command: str, *words: str | Path) -> str:
    """Return a command of the program that works when it is pasted into a shell.

    Args:
        command: Name of the command, such as evaluate.
        *words: Its arguments, which are quoted where the shell needs it. Words in capitals stand for what the user has.
    """
    program = Path(sys.argv[0])
    if program.name == "efficientnet":
        on_path = shutil.which(program.name)
        is_short = on_path is not None and Path(on_path).resolve() == program.resolve()
        start = f"{program.name if is_short else shlex.quote(str(program))} {command}"
    elif command in ("train", "evaluate") and program.name in ("train.py", "evaluate.py"):
        start = f"{python_executable()} {shlex.quote(str(program.with_name(f'{command}.py')))}"
    else:
        start = f"{python_executable()} -m pipeline {command}"
    return " ".join([start, *(shlex.quote(str(word)) for word in words)])


def describe_os_error(error: OSError) -> str:
    """Return the file and the reason of an error of the operating system, and the remedy if there is an obvious one."""
    remedies = {
        errno.ENOSPC: "; free some space, or set TMPDIR and the output folders to another disk",
        errno.EDQUOT: "; free some space, or use another disk",
        errno.EACCES: "; change its permissions, or choose another path",
        errno.EPERM: "; change its permissions, or choose another path",
        errno.EROFS: "; choose a path that can be written",
        errno.EMFILE: "; raise the limit of open files: ulimit -n 4096",
    }
    reason = f"{error.strerror or error}{remedies.get(error.errno or 0, '')}"
    return f"{error.filename}: {reason}" if error.filename else reason


def run_cli(program: Callable[[Console], int]) -> int:
    """Run a program and turn the exceptions that it raises into a message and an exit code.

    SIGTERM unwinds the program as Ctrl-C does, so that open files and runs are closed.

    Args:
        program: The program; it takes the console and returns its exit code.

    Returns:
        The exit code: 2 for bad input and for files that cannot be read or written, 1 for a failure, 130 for Ctrl-C,
        else that of the program.
    """
    console = Console()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return program(console)
    except UserError as error:
        console.error(f"error: {error}")
        return 2
    except TrainingError as error:
        console.error(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        console.error("interrupted")
        return 130
    except OSError as error:
        console.error(f"error: {describe_os_error(error)}")
        logging.getLogger("pipeline").debug("%s", error, exc_info=True)
        return 2
    except Exception as error:
        details = traceback.format_exc()
        where = f"the details are in {console.log_path}" if console.log_path else details
        console.error(f"unexpected {type(error).__name__}: {error}\n{where}")
        if console.log_path is not None:
            logging.getLogger("pipeline").error("%s", details)
        return 1


def plural(count: int, one: str, many: str = "") -> str:
    """Return a number with a noun in the form that it takes: `1 image`, `2,000 images`.

    Args:
        count: The number.
        one: The noun for one, with its verb if there is one: `image is`.
        many: The same for other numbers; by default `one` with an s.
    """
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def format_duration(seconds: float) -> str:
    """Return a text such as `2 min 05 s`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"

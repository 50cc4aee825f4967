"""SIGTERM and Ctrl-C: a run that is asked to stop ends between two steps, with its state saved."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class TrainingInterrupted(Exception):  # noqa: N818 - it is not an error
    """The run stopped on request, after a complete step and after the callbacks received its state."""


@contextmanager
def signal_handler(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> Iterator[None]:
    """Let a function, or one of the system's reactions, handle SIGTERM and Ctrl-C inside the block."""
    previous = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)


class StopSignal:
    """A flag that SIGTERM or a first Ctrl-C sets; a second Ctrl-C ends the process at once.

    Attributes:
        signal: Number of the signal that set the flag; 0 while it is not set.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        """Create the flag, not set.

        Args:
            report: Called with a line for the user when the flag is set.
        """
        self.signal, self._report = 0, report

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals inside the block, where one only sets the flag.

        Outside it, the signal ends the process as usual.
        """
        with signal_handler(self._set):
            yield

    def _set(self, number: int, frame: object) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        text = "stopping after this step or validation; Ctrl-C ends it at once"
        # In a thread of its own, as the signal may have come in the middle of a line.
        threading.Thread(target=self._report, args=(text,), daemon=True).start()

    def __call__(self) -> bool:
        """Return True if the flag is set."""
        return self.signal != 0

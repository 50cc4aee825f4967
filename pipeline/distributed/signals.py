"""SIGTERM and Ctrl-C: asked to stop, a run ends between two steps, its state saved."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StopSignal:
    """Whether the process was asked to stop, by SIGTERM or by a first Ctrl-C; a second Ctrl-C ends it at once.

    Attributes:
        signal: The number of the signal that asked; 0 while none did.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        """Takes what tells the user that the request was heard."""
        self.signal, self._say = 0, say

    @contextmanager
    def listening(self) -> Iterator[None]:
        """A block in which such a request waits for the end of the step. Outside it, the process ends as any other does."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        text = "stopping behind this step or validation; Ctrl-C ends it at once"
        threading.Thread(
            target=self._say, args=(text,), daemon=True
        ).start()  # the signal may have come in the middle of a line

    def __call__(self) -> bool:
        return self.signal != 0

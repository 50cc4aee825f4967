"""A screen for programs that run in the test's own process."""

from pathlib import Path

from pipeline.console import Console


class FakeConsole(Console):
    """Keeps what is said, and leaves the test's own output alone."""

    def __init__(self) -> None:
        super().__init__()
        self.console.width = 140
        self.said = ""

    def redirect_library_output(self, log: Path | None) -> None:
        """Nothing."""

    def print(self, text: object = "", *, details: str | None = None) -> None:
        """Keeps it."""
        with self.console.capture() as capture:
            self.console.print(text, markup=False, emoji=False)
        self.said += capture.get()

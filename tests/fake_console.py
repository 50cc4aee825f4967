"""A console for programs that run in the process of the test."""

from pathlib import Path

from pipeline.console import Console


class FakeConsole(Console):
    """Collects the output of a program; the output of the test is not redirected."""

    def __init__(self) -> None:
        super().__init__()
        self.rich.width = 140
        self.output = ""

    def redirect_library_output(self, log: Path | None) -> None:
        """Do nothing."""

    def print(self, text: object = "", *, details: str | None = None, wrap: bool = True) -> None:
        """Collect it."""
        with self.rich.capture() as capture:
            self.rich.print(text, markup=False, emoji=False, soft_wrap=None if wrap else True)
        self.output += capture.get()

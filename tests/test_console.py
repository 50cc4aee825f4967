"""The terminal."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich import console as rich_console

from pipeline.console import Console, python_executable


def test_a_printed_command_names_the_interpreter_that_has_the_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "my env/bin/python"))
    monkeypatch.chdir(tmp_path)
    assert python_executable() == "'my env/bin/python'"
    monkeypatch.chdir("/")
    monkeypatch.setattr("sys.executable", "/usr/bin/python3")
    assert python_executable() == "usr/bin/python3"
    monkeypatch.chdir(tmp_path)
    assert python_executable() == "/usr/bin/python3"


def test_progress_without_a_total_shows_the_rate() -> None:
    console = Console()
    console.rich = rich_console.Console(file=io.StringIO(), force_terminal=True, width=80)
    with console.progress("labeling") as count:
        count(12, None)
        count(1200, None)
    unknown = console.rich.file.getvalue()
    with console.progress("labeling") as count:
        count(1200, 5000)
    known = console.rich.file.getvalue().removeprefix(unknown)
    assert re.search(r"1,200, [\d,]+ a second", unknown)
    assert "1,200 of 5,000" in known


def test_reserved_stdout_holds_no_messages(capfd: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.print("before")
    print("row", file=console.reserve_stdout(), flush=True)
    console.print("after")
    console.error("wrong")
    with console.progress("labeling") as count:
        count(1, None)
    assert capfd.readouterr() == ("before\nrow\n", "after\nwrong\n")


PROGRAM = """
import sys
from pipeline.console import Console, run_cli

def main(console: Console) -> int:
    console.redirect_library_output(None)
    print("from a library", flush=True)
    console.print("from the program")
    raise KeyError("unexpected")

sys.exit(run_cli(main))
"""


@pytest.mark.parametrize("debug", ["0", "1"])
def test_debugging_shows_the_output_of_libraries_and_the_traceback(debug: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "EFFICIENTNET_DEBUG": debug}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    shown = ["from a library\n"] if debug == "1" else []
    assert ended.returncode == 1
    assert ended.stdout == "".join([*shown, "from the program\n"])
    assert "unexpected KeyError: 'unexpected'" in ended.stderr
    assert "Traceback" in ended.stderr

"""The terminal."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich import console as rich_console

from pipeline.console import Console, command_line, plural, python_executable


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


def terminal(width: int) -> Console:
    console = Console()
    console.rich = rich_console.Console(file=io.StringIO(), force_terminal=True, width=width, highlight=False)
    return console


def test_a_command_is_not_wrapped_and_prose_is() -> None:
    console, line = terminal(20), "python train.py --run-dir a-long-name --resume"
    console.print(line, wrap=False)
    console.print(line)
    first, *others = console.rich.file.getvalue().splitlines()
    assert first == line
    assert len(others) > 1
    assert max(map(len, others)) <= 20


def test_waiting_shows_the_time_elapsed_in_a_terminal_and_nothing_elsewhere() -> None:
    console = terminal(80)
    with console.waiting("loading"):
        pass
    assert re.search(r"loading.*0:00:00", console.rich.file.getvalue())
    console.rich = rich_console.Console(file=io.StringIO())
    with console.waiting("loading"):
        pass
    with console.progress("reading") as count:
        count(1, 2)
    assert console.rich.file.getvalue() == ""


def test_a_library_that_is_imported_meanwhile_keeps_the_real_streams() -> None:
    console, streams = terminal(80), (sys.stdout, sys.stderr)
    with console.waiting("loading"):
        assert (sys.stdout, sys.stderr) == streams


@pytest.mark.parametrize(
    ("count", "words", "text"),
    [
        (1, ("image",), "1 image"),
        (0, ("image",), "0 images"),
        (2000, ("image",), "2,000 images"),
        (1, ("class has", "classes have"), "1 class has"),
        (3, ("class has", "classes have"), "3 classes have"),
    ],
)
def test_a_number_has_its_form_of_the_noun(count: int, words: tuple[str, ...], text: str) -> None:
    assert plural(count, *words) == text


@pytest.mark.parametrize("on_path", [True, False])
def test_the_installed_program_is_named_so_that_the_shell_finds_it(
    on_path: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "my env/efficientnet"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.argv", [str(program)])
    monkeypatch.setenv("PATH", str(program.parent) if on_path else "/usr/bin")
    start = "efficientnet" if on_path else f"'{program}'"
    assert command_line("predict", "--run", "my run") == f"{start} predict --run 'my run'"


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

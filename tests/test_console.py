"""What a person is shown."""

import io
import re
from pathlib import Path

import pytest
from rich import console as rich_console

from pipeline.console import Console, python_executable


def test_a_command_that_is_shown_names_the_interpreter_that_has_the_libraries(
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


def test_what_is_counted_shows_how_fast_it_goes_where_its_end_is_not_known() -> None:
    screen = Console()
    screen.console = rich_console.Console(file=io.StringIO(), force_terminal=True, width=80)
    with screen.progress("labelling") as count:
        count(12, None)
        count(1200, None)
    unknown = screen.console.file.getvalue()
    with screen.progress("labelling") as count:
        count(1200, 5000)
    known = screen.console.file.getvalue().removeprefix(unknown)
    assert re.search(r"1,200, [\d,]+ a second", unknown)
    assert "1,200 of 5,000" in known


def test_output_that_is_given_away_holds_nothing_that_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    screen = Console()
    screen.print("before")
    print("row", file=screen.reserve_stdout(), flush=True)
    screen.print("said")
    screen.error("wrong")
    with screen.progress("labelling") as count:
        count(1, None)
    assert capfd.readouterr() == ("before\nrow\n", "said\nwrong\n")

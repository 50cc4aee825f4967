"""What a person is shown."""

from pathlib import Path

import pytest

from pipeline.screen import this_python


def test_a_command_that_is_shown_names_the_interpreter_that_has_the_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "my env/bin/python"))
    monkeypatch.chdir(tmp_path)
    assert this_python() == "'my env/bin/python'"
    monkeypatch.chdir("/")
    monkeypatch.setattr("sys.executable", "/usr/bin/python3")
    assert this_python() == "usr/bin/python3"
    monkeypatch.chdir(tmp_path)
    assert this_python() == "/usr/bin/python3"

"""What is noted about where a run came from."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.runs.provenance import flatten, git_commit, mask_credentials, provenance


def test_commit_and_local_changes_are_noted_where_the_file_is_tracked(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    file = tmp_path / "code.py"
    file.write_text("a = 1")
    assert git_commit(file) == {}
    git("init")
    assert git_commit(file) == {}
    git("add", "code.py")
    git("commit", "-m", "first")
    assert git_commit(file) == {"git.commit": git("rev-parse", "HEAD"), "git.dirty": "false"}
    file.write_text("a = 2")
    assert git_commit(file) == {"git.commit": git("rev-parse", "HEAD"), "git.dirty": "true"}


def test_origin_names_command_directory_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", "a key=b", "tracking.uri=https://me:pw@host"])
    noted = provenance(tmp_path / "run")
    assert noted["command"] == "python train.py 'a key=b' tracking.uri=https://***@host"
    assert noted["run_directory"] == str(tmp_path / "run")
    assert noted["version.keras"].startswith("3.")


def test_config_becomes_dotted_names_and_texts() -> None:
    values = {"a": {"b": ["x", None, {}]}, "c": 1e-3, "d": True, "e": [], "uri": "https://me:pw@host/x"}
    assert dict(flatten(values)) == {
        "a.b.0": "x",
        "a.b.1": "null",
        "a.b.2": "{}",
        "c": "0.001",
        "d": "true",
        "e": "[]",
        "uri": "https://***@host/x",
    }


def test_addresses_without_credentials_stay_as_they_are() -> None:
    for text in ("sqlite:////tmp/a@b/mlflow.db", "http://127.0.0.1:5000", "mail me@example.org"):
        assert mask_credentials(text) == text

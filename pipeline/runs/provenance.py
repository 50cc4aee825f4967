"""Provenance of a run (command, versions, git commit) and its config as flat names and texts, for MLflow."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("tensorflow", "keras", "numpy", "mlflow")


def provenance(run_directory: Path) -> dict[str, str]:
    """Return the directory, command line and versions of a run.

    In a git repository also `git.commit` and `git.dirty`.
    """
    texts = {
        "command": shlex.join(sys.orig_argv),
        "run_directory": str(run_directory.resolve()),
        "version.python": sys.version.split()[0],
    }
    texts |= {f"version.{package}": version(package) for package in PACKAGES}
    texts |= git_commit(Path(__file__))
    return {key: mask_credentials(value) for key, value in texts.items()}


def git_commit(file: Path) -> dict[str, str]:
    """Return the commit of the repository that tracks `file`, and whether it has local changes; empty if none does."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=file.parent, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)  # fails in a virtual environment that lies in another repository
        return {"git.commit": git("rev-parse", "HEAD"), "git.dirty": str(bool(git("status", "--porcelain"))).lower()}
    except (OSError, subprocess.SubprocessError):
        return {}


def flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted names and the values as text of nested mappings and lists.

    List items are named by their index.
    """
    children = (
        dict(values) if isinstance(values, Mapping) else dict(enumerate(values)) if isinstance(values, list) else {}
    )
    for key, value in children.items():
        yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    if not children:
        yield prefix, mask_credentials(values if isinstance(values, str) else json.dumps(values))


def mask_credentials(text: str) -> str:
    """Return the text with user and password masked in every URL."""
    return re.sub(r"(?<=://)[^/@\s]+@", "***@", text)

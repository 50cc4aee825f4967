"""Where a run came from and what it was told, as short texts by name."""

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


def origin(run_directory: Path) -> dict[str, str]:
    """The run's directory, command line, versions and, where the code is in a git repository, `git.commit` and `git.dirty`."""
    texts = {
        "command": shlex.join(sys.orig_argv),
        "run_directory": str(run_directory.resolve()),
        "version.python": sys.version.split()[0],
    }
    texts |= {f"version.{package}": version(package) for package in PACKAGES}
    texts |= commit(Path(__file__))
    return {key: without_credentials(value) for key, value in texts.items()}


def commit(file: Path) -> dict[str, str]:
    """Commit of the repository that `file` belongs to and whether anything differs from it; nothing where it belongs to none."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=file.parent, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        git(
            "ls-files", "--error-unmatch", file.name
        )  # or it would be the repository around somebody's virtual environment
        return {"git.commit": git("rev-parse", "HEAD"), "git.dirty": str(bool(git("status", "--porcelain"))).lower()}
    except (OSError, subprocess.SubprocessError):
        return {}


def flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and values as text, list items by their positions."""
    children = (
        dict(values) if isinstance(values, Mapping) else dict(enumerate(values)) if isinstance(values, list) else {}
    )
    for key, value in children.items():
        yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    if not children:
        yield prefix, without_credentials(values if isinstance(values, str) else json.dumps(values))


def without_credentials(text: str) -> str:
    """Masks user and password in web addresses."""
    return re.sub(r"(?<=://)[^/@\s]+@", "***@", text)

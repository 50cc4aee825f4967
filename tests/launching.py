"""The other end of launcher.py."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import PROJECT


@dataclass(frozen=True)
class Ended:
    """A process that has ended.

    Attributes:
        code: Its exit code; negative: the signal.
        stdout: Its standard output.
        stderr: Its standard error.
        seconds: Its processor time, without the loading of the libraries.
    """

    code: int
    stdout: str
    stderr: str
    seconds: float


class LauncherProcess:
    """A launcher: runs one process at a time."""

    def __init__(self, *, light: bool = False) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(PROJECT / "tests" / "launcher.py"), *(["light"] if light else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"},
        )

    def start(
        self,
        folder: Path,
        *command: str,
        stdout: Path,
        stderr: Path,
        stdin: Path | str = os.devnull,
        faults: dict[str, Any] | None = None,
    ) -> None:
        """Starts a process; `answer` waits for its end."""
        assert self._process.stdin is not None
        files = {"stdin": str(stdin), "stdout": str(stdout), "stderr": str(stderr)}
        job = {"folder": str(folder), "command": command, "faults": faults, **files}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The exit code and the seconds of processor time."""
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def run(self, folder: Path, *command: str, stdin: bytes = b"") -> Ended:
        """Runs `python *command` in a folder to its end."""
        with tempfile.TemporaryDirectory() as name:
            files = {stream: Path(name) / stream for stream in ("stdin", "stdout", "stderr")}
            files["stdin"].write_bytes(stdin)
            self.start(folder, *command, **files)
            answer = self.answer()
            return Ended(**answer, stdout=files["stdout"].read_text(), stderr=files["stderr"].read_text())

    def close(self) -> None:
        """Ends the launcher."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


class RunLauncher:
    """Runs train.py in one folder, through a launcher, with faults; output and marker of each run are files there."""

    def __init__(self, folder: Path, launcher: LauncherProcess) -> None:
        self.folder = folder
        self.launcher = launcher

    def launch(self, run: str, *arguments: str, **faults: Any) -> None:
        """Starts a process of a run; `ended` waits for its end."""
        self.launcher.start(
            self.folder,
            *("train.py", "--run-dir", run, *arguments),
            stdout=self.output(run),
            stderr=self.output(run),
            faults={
                "marker": str(self.marker(run)),
                **{"traps": [], "poison": None, "devices": 1, "tf_config": None, **faults},
            },
        )

    def ended(self) -> int:
        """The exit code."""
        return self.launcher.answer()["code"]

    def output(self, run: str) -> Path:
        """Standard output and standard error of the processes of a run."""
        return self.folder / f"{run}.output"

    def marker(self, run: str) -> Path:
        """The traps that the latest process of a run sprang."""
        return self.folder / f"{run}.marker"

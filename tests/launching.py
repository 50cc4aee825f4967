"""The other end of launcher.py."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from launcher import PROJECT


class LauncherProcess:
    """A launcher, and the folder that the runs' processes work in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, str(PROJECT / "tests" / "launcher.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"},
        )

    def launch(self, run: str, *arguments: str, **further: Any) -> None:
        """Starts a process of a run; `ended` waits for its end. `further` is the rest of the job."""
        assert self._process.stdin is not None
        job = {
            "folder": str(self.folder),
            "arguments": ["--run-dir", run, *arguments],
            "screen": str(self.screen(run)),
            "marker": str(self.marker(run)),
            **{"traps": [], "poison": None, "devices": 1, "tf_config": None, **further},
        }
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()

    def ended(self) -> int:
        """The exit code."""
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def screen(self, run: str) -> Path:
        """What the processes of a run showed."""
        return self.folder / f"{run}.screen"

    def marker(self, run: str) -> Path:
        """The traps that the latest process of a run sprang."""
        return self.folder / f"{run}.marker"

    def close(self) -> None:
        """Ends the launcher."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

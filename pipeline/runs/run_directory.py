"""The directory of a run: its files, the creation of a new one, and the search for an earlier one."""

import datetime
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.loader import load_config
from pipeline.config.schema import Config
from pipeline.errors import RunError, UserError
from pipeline.files import atomic_write, exclusive_lock, temporary_name

RUNS = Path("runs")
SQLITE = "sqlite:///"  # start of a tracking URI that names a file
_WORKER_LOG = "log-of-process-"
# The files of a run that failed before its data were read. Such a directory may be used again.
_BEFORE_TRAINING = {"config.yaml", temporary_name("config.yaml"), "log.txt", ".lock"}


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run.

    Attributes:
        path: The directory.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config, defaults included."""
        return self.path / "config.yaml"

    @property
    def manifest(self) -> Path:
        """Every image with its label and split."""
        return self.path / "manifest.parquet"

    @property
    def classes(self) -> Path:
        """The class names, one per line, in the order of the model's outputs."""
        return self.path / "classes.txt"

    @property
    def checkpoints(self) -> Path:
        """The checkpoints, one folder each."""
        return self.path / "checkpoints"

    @property
    def best_model(self) -> Path:
        """The model of the best epoch on the validation split."""
        return self.path / "best" / "model.keras"

    @property
    def model(self) -> Path:
        """The final model, with averaged weights if the config has `optimizer.ema_decay`. It marks a finished run."""
        return self.path / "model.keras"

    @property
    def pending_model(self) -> Path:
        """The final model until everything else of the run is written; then it is renamed to `model`."""
        return self.path / "final.keras"

    @property
    def report(self) -> Path:
        """The folder of the report: the page and its figures."""
        return self.path / "report"

    @property
    def html_report(self) -> Path:
        """The report as one HTML file."""
        return self.report / "index.html"

    @property
    def calibration(self) -> Path:
        """The temperature that was fitted on the validation split."""
        return self.path / "calibration.json"

    @property
    def skipped_images(self) -> Path:
        """The images that cannot be used, as CSV; absent if there are none."""
        return self.report / "skipped_images.csv"

    @property
    def log(self) -> Path:
        """The log, with the output of the libraries."""
        return self.path / "log.txt"

    def worker_log(self, process: int) -> Path:
        """Return the log file of a worker process; `process` is its rank, which counts from 0."""
        return self.path / f"{_WORKER_LOG}{process + 1}.txt"

    @property
    def mlflow_file(self) -> Path:
        """The tracking URI and the id of the run in MLflow, as JSON."""
        return self.path / "mlflow.json"

    @property
    def nan_batches(self) -> Path:
        """The batches whose loss or gradient was not finite, each beside a checkpoint of the state before its step."""
        return self.path / "nan"

    def evaluation(self, split: str) -> Path:
        """Return the folder of the results on a split."""
        return self.path / "evaluation" / split

    def predictions(self, split: str) -> Path:
        """Return the file of the predictions for each image of a split."""
        return self.evaluation(split) / "predictions.parquet"

    def comparison(self, others: Sequence[str]) -> Path:
        """Return the folder of a comparison of this run with others, named after their directories."""
        return self.report / "compare" / "+".join(others)

    @property
    def export(self) -> Path:
        """The folder of the model in other formats."""
        return self.path / "export"

    @contextmanager
    def exclusive_lock(self) -> Iterator[None]:
        """Keep other processes from working on the run during the block. The lock is released however the process ends.

        Raises:
            RunError: Another process holds the lock.
        """
        busy = f"{self.path}: another process is working on this run; wait until it ends, or choose another --run-dir"
        with exclusive_lock(self.path / ".lock", RunError(busy)):
            yield

    @contextmanager
    def removed_if_unused(self) -> Iterator[None]:
        """Remove the directory if the block fails for a mistake in the input before the run has its data."""
        try:
            yield
        except (UserError, OSError):
            with suppress(OSError):
                if {path.name for path in self.path.iterdir()} <= _BEFORE_TRAINING:
                    shutil.rmtree(self.path)
                    for parent in self.path.parents[:2]:
                        if RUNS in (parent, parent.parent):
                            parent.rmdir()  # raises if it is not empty
            raise

    def save_config(self, config: Config) -> None:
        """Save the config of a run without a checkpoint.

        A changed config starts a new run in MLflow, an equal one continues it.
        """
        if self.config.exists() and self.config.read_text(encoding="utf-8") != config.to_yaml():
            self.mlflow_file.unlink(missing_ok=True)
        atomic_write(self.config, config.to_yaml())

    def has_checkpoints(self) -> bool:
        """Return True if there is a checkpoint, valid or damaged."""
        return any(self.checkpoints.glob("step-*"))

    def load_config(self, overrides: Sequence[str] = ()) -> Config:
        """Load the resolved config, with changes such as data.path=PATH for data that have been moved."""
        return load_config(self.config, overrides)

    def temperature(self) -> float | None:
        """Read from `calibration` the temperature that the logits are divided by for calibrated probabilities.

        None if none could be fitted.
        """
        return json.loads(self.calibration.read_text())["temperature"]

    def mlflow_run(self) -> tuple[str, str] | None:
        """Return the tracking URI and the id of the run in MLflow; None before it is tracked.

        A database file that is not where it was is looked for, by its name, in the folders above the run: a project may
        be moved as a whole.
        """
        if not self.mlflow_file.exists():
            return None
        entry = json.loads(self.mlflow_file.read_text())
        uri = str(entry["uri"])
        database = Path(uri.removeprefix(SQLITE))
        if uri.startswith(SQLITE) and not database.exists():
            moved = (folder / database.name for folder in self.path.resolve().parents)
            uri = next((f"{SQLITE}{path}" for path in moved if path.exists()), uri)
        return uri, entry["run_id"]

    def save_mlflow_run(self, uri: str, run_id: str) -> None:
        """Save the tracking URI and the id of the run in MLflow, for a resume and for later evaluations."""
        atomic_write(self.mlflow_file, json.dumps({"uri": uri, "run_id": run_id}) + "\n")


def create(path: Path | None, experiment: str) -> RunDirectory:
    """Create the directory of a new run.

    Args:
        path: The directory; None for runs/<experiment>/<date-time>.
        experiment: Name of the experiment.

    Raises:
        RunError: The directory exists and holds more than a run that failed before its data were read.
    """
    if path is None:
        now = datetime.datetime.now()
        while True:
            path = RUNS / experiment / now.strftime("%Y-%m-%d_%H-%M-%S")
            try:
                path.mkdir(parents=True)  # fails in one of two runs that start in the same second
                break
            except FileExistsError:
                now += datetime.timedelta(seconds=1)
    run = RunDirectory(path)
    if path.exists() and not (
        path.is_dir() and {i.name for i in path.iterdir() if not i.name.startswith(_WORKER_LOG)} <= _BEFORE_TRAINING
    ):
        if run.config.exists() and not run.model.exists():
            raise RunError(f"{path}: holds an unfinished run; continue it with --resume, or choose another --run-dir")
        raise RunError(f"{path}: already exists and is not overwritten; choose another --run-dir")
    path.mkdir(parents=True, exist_ok=True)
    return run


def check_can_create(path: Path | None, experiment: str, config: Config) -> None:
    """Check that a run can be created and written, by doing so; leave nothing behind.

    Args:
        path: As in `create`.
        experiment: As in `create`.
        config: The config, which is written into it for a moment.

    Raises:
        RunError: As in `create`.
        OSError: The directory cannot be made, or it cannot be written to.
    """
    folder = path or RUNS / experiment
    created = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        run = create(path, experiment)
        if path is None:
            created.insert(0, run.path)
        trial = run.path / temporary_name(run.config.name)
        trial.write_text(config.to_yaml(), encoding="utf-8")
        trial.unlink()
    finally:
        for folder in created:
            with suppress(OSError):  # another process has a run in it by now
                folder.rmdir()


def find(name: str) -> RunDirectory:
    """Find a run by its directory, its MLflow run id, or `latest`: the newest finished run under runs/.

    Raises:
        RunError: There is no such run.
    """
    if name == "latest":
        finished = [run for run in _runs() if run.model.exists()]
        if not finished:
            raise RunError(f"{RUNS}/: holds no finished run; train one, or name the directory of a run with --run")
        return max(finished, key=lambda run: run.model.stat().st_mtime)
    if Path(name).is_dir():
        run = RunDirectory(Path(name))
        if not run.config.exists():
            raise RunError(f"{name}: is not the directory of a run (it has no config.yaml)")
        return run
    for run in _runs():
        tracked = run.mlflow_run()
        if tracked is not None and tracked[1] == name:
            return run
    raise RunError(f"{name}: is neither a directory, nor the MLflow run id of a run under {RUNS}/, nor latest")


def _runs() -> list[RunDirectory]:
    return [RunDirectory(config.parent) for config in RUNS.rglob("config.yaml")]

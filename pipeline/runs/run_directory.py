"""A run's directory: what stands where in it, how a new one is made and how an old one is found."""

import datetime
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.config.loader import load_config
from pipeline.config.schema import Config
from pipeline.errors import RunError

RUNS = Path("runs")
_OTHERS = "log-of-process-"
_BEFORE_TRAINING = {
    "config.yaml",
    ".config.yaml.new",
    "log.txt",
    ".lock",
}  # all that a run holds which failed before its data were read


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run.

    Attributes:
        path: The directory.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The config as resolved, with every default."""
        return self.path / "config.yaml"

    @property
    def manifest(self) -> Path:
        """Every sample with its label and split."""
        return self.path / "manifest.parquet"

    @property
    def classes(self) -> Path:
        """The class names, one a line, in the order of the network's outputs."""
        return self.path / "classes.txt"

    @property
    def checkpoints(self) -> Path:
        """What a resume starts from."""
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """The network of the best epoch on the validation split."""
        return self.path / "best" / "model.keras"

    @property
    def model(self) -> Path:
        """The network at the end of the run, its weights averaged where the config says so."""
        return self.path / "model.keras"

    @property
    def final(self) -> Path:
        """Where the final network waits until everything else of the run is written."""
        return self.path / "final.keras"

    @property
    def report(self) -> Path:
        """Pictures of the run."""
        return self.path / "report"

    @property
    def page(self) -> Path:
        """The report itself, to be opened in a browser."""
        return self.report / "index.html"

    @property
    def calibration(self) -> Path:
        """The temperature that was fitted on the validation split."""
        return self.path / "calibration.json"

    @property
    def left_out(self) -> Path:
        """The samples that cannot be used; only where there are any."""
        return self.report / "left_out.csv"

    @property
    def log(self) -> Path:
        """What the libraries had to say."""
        return self.path / "log.txt"

    def log_of(self, process: int) -> Path:
        """The same of another process of the run than the first; its number counts from 0."""
        return self.path / f"{_OTHERS}{process + 1}.txt"

    @property
    def tracking(self) -> Path:
        """The run's identity in MLflow."""
        return self.path / "mlflow.json"

    @property
    def not_finite(self) -> Path:
        """Batches whose loss or gradient was not finite, each with the state that it met."""
        return self.path / "nan"

    def evaluation(self, split: str) -> Path:
        """The results on a split."""
        return self.path / "evaluation" / split

    def predictions(self, split: str) -> Path:
        """What the network said of each image of a split."""
        return self.evaluation(split) / "predictions.parquet"

    def comparison(self, others: Sequence[str]) -> Path:
        """Where a comparison with other runs is kept, which go by name: it belongs to the run that is judged."""
        return self.report / "compare" / "+".join(others)

    @property
    def export(self) -> Path:
        """The network for other runtimes."""
        return self.path / "export"

    @contextmanager
    def exclusive_lock(self) -> Iterator[None]:
        """A block in which no other process can enter the same run's. It is free again however this process ends.

        Raises:
            RunError: If another process is in it.
        """
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise RunError(
                f"{self.path}: another process is at work on this run; wait for its end, or choose another --run-dir"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def begin(self, config: Config) -> None:
        """Notes the config of a run that has no checkpoint. If it had the same one before, its run in MLflow is gone on with."""
        if self.config.exists() and self.config.read_text(encoding="utf-8") != config.to_yaml():
            self.tracking.unlink(missing_ok=True)
        write(self.config, config.to_yaml())

    def has_checkpoints(self) -> bool:
        """Whether there is something to resume from, be it damaged."""
        return any(self.checkpoints.glob("step-*"))

    def load_config(self) -> Config:
        """The config that the run was made from."""
        return load_config(self.config)

    def temperature(self) -> float | None:
        """What the logits are divided by for probabilities that may be believed; None where none was fitted or none could be settled."""
        return json.loads(self.calibration.read_text())["temperature"] if self.calibration.exists() else None

    def mlflow_run(self) -> tuple[str, str] | None:
        """Where MLflow keeps the run and its id there, once they are known."""
        if not self.tracking.exists():
            return None
        noted = json.loads(self.tracking.read_text())
        return noted["uri"], noted["run_id"]

    def note_mlflow_run(self, uri: str, run_id: str) -> None:
        """Keeps them for a resume and for later evaluations."""
        write(self.tracking, json.dumps({"uri": uri, "run_id": run_id}) + "\n")


def create(path: Path | None, experiment: str) -> RunDirectory:
    """Makes the directory of a new run.

    Args:
        path: Where; None for runs/<experiment>/<date-time>.
        experiment: Name of the experiment.

    Raises:
        RunError: If something stands there already.
    """
    if path is None:
        now = datetime.datetime.now()
        while True:
            path = RUNS / experiment / now.strftime("%Y-%m-%d_%H-%M-%S")
            try:
                path.mkdir(parents=True)  # of two runs that start at once, one finds it taken
                break
            except FileExistsError:
                now += datetime.timedelta(seconds=1)
    run = RunDirectory(path)
    if path.exists() and not (
        path.is_dir() and {i.name for i in path.iterdir() if not i.name.startswith(_OTHERS)} <= _BEFORE_TRAINING
    ):
        if run.config.exists() and not run.model.exists():
            raise RunError(f"{path}: holds an unfinished run; go on with it by --resume, or choose another --run-dir")
        raise RunError(f"{path}: exists already and nothing in it is overwritten; choose another --run-dir")
    path.mkdir(parents=True, exist_ok=True)
    return run


def find(name: str) -> RunDirectory:
    """Finds a run by its directory, its MLflow run id, or `latest`: the newest finished run under runs/.

    Raises:
        RunError: If there is none.
    """
    if name == "latest":
        finished = [run for run in _runs() if run.model.exists()]
        if not finished:
            raise RunError(f"{RUNS}/: holds no finished run; train one, or give a run's directory by --run")
        return max(finished, key=lambda run: run.model.stat().st_mtime)
    if Path(name).is_dir():
        run = RunDirectory(Path(name))
        if not run.config.exists():
            raise RunError(f"{name}: is not a run's directory (it has no config.yaml)")
        return run
    for run in _runs():
        tracked = run.mlflow_run()
        if tracked is not None and tracked[1] == name:
            return run
    raise RunError(f"{name}: is neither a directory, nor the MLflow id of a run under {RUNS}/, nor the word latest")


def _runs() -> list[RunDirectory]:
    return [RunDirectory(config.parent) for config in RUNS.rglob("config.yaml")]


def write(path: Path, content: str) -> None:
    """Writes a text file whole or not at all."""
    aside = path.with_name(f".{path.name}.new")
    aside.write_text(content, encoding="utf-8")
    aside.replace(path)

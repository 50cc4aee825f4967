"""A run in MLflow: its parameters, metrics, data, results and models.

MLflow is imported when a tracker is entered, so that importing this module costs nothing. What MLflow and its database layer have to say
goes to `logging`, not to the screen.
"""

import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

from pipeline.config.schema import Config
from pipeline.console import python_executable
from pipeline.runs.provenance import flatten, origin, without_credentials
from pipeline.tracking.mlflow_store import (
    database_of,
    exclusive_lock,
    find_experiment,
    import_mlflow,
    last_steps,
    metric_links,
    run_exists,
    tracking_uri,
    translate_mlflow_error,
)
from pipeline.tracking.model_registry import ModelRegistry
from pipeline.training.callbacks import Callback

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_FLUSHES = 10.0
SECONDS_AFTER_FAILURE = 60.0
MAX_METRICS, MAX_PARAMS = 1000, 100  # per call; MLflow refuses more
MAX_PARAM, MAX_TAG, MAX_DIGEST = 6000, 8000, 36  # characters; MLflow's limits
NO_PARAM_NAME = (
    r"[^\w./: -]"  # characters that MLflow refuses in the name of a parameter, such as that of a class with a weight
)


class MLflowLogger(Callback):
    """A run in MLflow for the time of a `with` block, and the training loop's hook that reports to it.

    The run ends as FINISHED, as KILLED when it was interrupted, or as FAILED with the error in its tag `error`. Metrics are kept back and
    sent in batches. When MLflow cannot be reached in the middle of a run, training goes on and they are sent later.

    Attributes:
        uri: Where MLflow keeps the run, without user and password.
        run_id: MLflow's id of the run; known inside the block.
    """

    run_id: str

    def __init__(
        self,
        config: Config,
        run_directory: Path,
        *,
        resumed: tuple[str, str] | None = None,
        changes: Sequence[str] = (),
    ) -> None:
        """Names the run; nothing is contacted yet.

        Args:
            config: Its values become the run's parameters; `tracking` says where to.
            run_directory: Its name becomes the run's.
            resumed: URI and run id of an earlier part of the same run, to go on with. If MLflow there does not know it (any more), a new
                run is begun.
            changes: In what a resumed run differs from how it began, a line each; they become its tag `changes`.
        """
        self._config, self._directory, self._resumed = config, run_directory, resumed[1] if resumed else None
        self._changes = "\n".join(changes)
        self._uri = tracking_uri(config, resumed[0] if resumed else None)
        self.uri = re.sub(r"://[^/@]+@", "://", self._uri)
        self._buffer: list[Metric] = []
        self._last_steps: dict[str, int] = {}
        self._next_flush = 0.0
        self._unreachable = False

    def __enter__(self) -> "MLflowLogger":
        """Starts the run, or goes on with it.

        Raises:
            ConfigError: If the tracking server or database cannot be used.
        """
        mlflow, tags = import_mlflow(), {key: value[:MAX_TAG] for key, value in self._origin().items()}
        self._outer_uri: Any = os.environ.get("MLFLOW_TRACKING_URI")  # MLflow's global state is put back at the end
        try:
            with translate_mlflow_error(self._uri), exclusive_lock(self._uri):
                mlflow.set_tracking_uri(self._uri)
                self._client = mlflow.MlflowClient(self._uri)
                self._start(mlflow, tags)
        except BaseException:
            with suppress(Exception):
                mlflow.end_run("FAILED")
            mlflow.set_tracking_uri(self._outer_uri)
            raise
        self._next_flush = time.monotonic() + SECONDS_BETWEEN_FLUSHES
        return self

    def _origin(self) -> dict[str, str]:
        return origin(self._directory) | ({"changes": without_credentials(self._changes)} if self._changes else {})

    def _start(self, mlflow: ModuleType, tags: Mapping[str, str]) -> None:
        experiment = find_experiment(self._client, self._uri, self._config.tracking.experiment)
        if self._resumed is not None and not run_exists(self._client, self._resumed):
            logger.warning(
                "MLflow at %s does not know the run %s; a new one is begun",
                without_credentials(self._uri),
                self._resumed,
            )
            self._resumed = None
        if self._resumed is not None:
            self._last_steps = last_steps(self._client, self._resumed)
            if "error" in self._client.get_run(self._resumed).data.tags:
                self._client.delete_tag(self._resumed, "error")
        name = self._directory.resolve().name
        run = mlflow.start_run(
            run_id=self._resumed, experiment_id=experiment, run_name=name, tags=tags, log_system_metrics=True
        )
        self.run_id = run.info.run_id
        known = self._client.get_run(
            self.run_id
        ).data.params  # of a run that was killed while it began, perhaps not all
        values = {
            re.sub(NO_PARAM_NAME, "_", key): value for key, value in flatten(self._config.model_dump(mode="json"))
        }
        params = [(key, value[:MAX_PARAM]) for key, value in values.items() if key not in known]
        for i in range(0, len(params), MAX_PARAMS):
            mlflow.log_params(dict(params[i : i + MAX_PARAMS]))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Sends what is left and closes the run."""
        import mlflow

        self.flush()
        status = _status(error)
        try:
            mlflow.end_run(status)
            if status == "FAILED":
                self._client.set_tag(
                    self.run_id, "error", without_credentials(f"{type(error).__name__}: {error}")[:MAX_TAG]
                )
        except Exception:  # whatever went wrong here must not hide what went wrong in the run
            logger.exception("MLflow at %s did not take the end of run %s", without_credentials(self._uri), self.run_id)
        finally:
            mlflow.set_tracking_uri(self._outer_uri)

    def ui_command(self) -> str:
        """The command that opens MLflow's pages on the run's database, for this machine only; for a server, its address."""
        if database_of(self._uri) is None:
            return without_credentials(self._uri)
        uri = "sqlite:///mlflow.db" if database_of(self._uri) == Path("mlflow.db").resolve() else self._uri
        return f"{python_executable()} -m mlflow ui --backend-store-uri {uri} --host 127.0.0.1"

    def log_dataset(self, name: str, digest: str, source: str, class_counts: Mapping[str, Mapping[str, int]]) -> None:
        """Notes what the run is trained on. Does nothing when a run is gone on with that has it already.

        Args:
            name: Of the data set.
            digest: Changes whenever the data do; its first 36 characters are kept.
            source: Where the data are: a path, or a name in a collection.
            class_counts: Images per class name, per split.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        if self._client.get_run(self.run_id).inputs.dataset_inputs:
            return
        profile = {
            "num_images": {split: sum(counts.values()) for split, counts in class_counts.items()},
            "class_counts": class_counts,
        }
        dataset = Dataset(name, digest[:MAX_DIGEST], "local", json.dumps({"uri": source}), profile=json.dumps(profile))
        with translate_mlflow_error(self._uri):
            self._client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])

    def log_metrics(self, metrics: Mapping[str, float], step: int, **links: str) -> None:
        """Takes metrics to be sent with the next batch. A metric that has a value for this step or a later one keeps it."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        for key, value in metrics.items():
            if step > self._last_steps.get(key, -1):
                self._last_steps[key] = step
                self._buffer.append(Metric(key, float(value), now, step, **links))
        if time.monotonic() >= self._next_flush:
            self.flush()

    def log_results(self, metrics: Mapping[str, float], step: int) -> None:
        """Sends the figures of the final network, linked to the model that `log_model` logged and to the data set.

        Raises:
            ConfigError: If MLflow cannot be reached.
        """
        with translate_mlflow_error(self._uri):
            found = metric_links(self._client, self.run_id)
        self.log_metrics(metrics, step, **found)
        self.flush()

    def registry(self, name: str) -> ModelRegistry:
        """A name in the model registry beside the run."""
        return ModelRegistry(self._client, self._uri, name)

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of a step."""
        self.log_metrics(metrics, step)

    def on_epoch_end(self, record: Mapping[str, float]) -> None:
        """Takes an epoch's record: `step`, `epoch` and metrics by name."""
        self.log_metrics({key: value for key, value in record.items() if key != "step"}, int(record["step"]))

    def on_checkpoint(self, state: object) -> None:
        """Sends everything, so that MLflow knows at least what the checkpoint knows."""
        if not self._unreachable:
            self.flush()

    def flush(self) -> None:
        """Sends the metrics kept back. What MLflow does not take is kept for later, and the log says so."""
        try:
            while self._buffer:
                self._client.log_batch(self.run_id, metrics=self._buffer[:MAX_METRICS])
                del self._buffer[:MAX_METRICS]
            self._unreachable = False
        except Exception as error:  # whatever it is, it is no reason to stop training
            self._unreachable = True
            reason = without_credentials(str(error))
            logger.warning(
                "MLflow at %s did not take %d metrics: %s", without_credentials(self._uri), len(self._buffer), reason
            )
        self._next_flush = time.monotonic() + (SECONDS_AFTER_FAILURE if self._unreachable else SECONDS_BETWEEN_FLUSHES)

    def log_artifacts(self, path: Path, name: str | None = None) -> None:
        """Copies a file, or all that is in a directory, to the run's artifacts.

        Args:
            path: The file or directory.
            name: Folder among the artifacts; None for the top.

        Raises:
            ConfigError: If MLflow does not take them.
        """
        with translate_mlflow_error(self._uri):
            if path.is_dir():
                self._client.log_artifacts(self.run_id, str(path), name)
            else:
                self._client.log_artifact(self.run_id, str(path), name)

    def log_model(self, path: Path, name: str, *, step: int) -> str:
        """Logs a saved network as an MLflow model that `mlflow.keras.load_model` loads, in the place of one that the run has already.

        Args:
            path: The .keras file.
            name: Of the model in MLflow.
            step: The step that it was saved at; the run's metrics of this step become the model's.

        Returns:
            The model's URI, `models:/<id>`.

        Raises:
            ConfigError: If MLflow does not take it.
        """
        import keras
        import mlflow
        import numpy as np
        from mlflow.models import infer_signature

        self.flush()
        model = keras.saving.load_model(path, compile=False)
        example, output = (np.zeros((1, *shape[1:]), np.float32) for shape in (model.input_shape, model.output_shape))
        requirements = [f"{package}=={version(package)}" for package in ("tensorflow", "keras", "mlflow")]
        with translate_mlflow_error(self._uri):
            experiment = self._client.get_run(self.run_id).info.experiment_id
            for earlier in self._client.search_logged_models(
                [experiment], f"source_run_id = '{self.run_id}' AND name = '{name}'"
            ):
                self._client.delete_logged_model(earlier.model_id)  # an earlier end of the run was cut off
            info = mlflow.keras.log_model(
                model, name=name, signature=infer_signature(example, output), pip_requirements=requirements, step=step
            )
        return info.model_uri


def log_evaluation(
    config: Config, tracked: tuple[str, str], metrics: Mapping[str, float], directory: Path, page: Path
) -> None:
    """Adds an evaluation to a run that has ended, leaving its status as it is; linked to the run's model and data set.

    Args:
        config: The run's.
        tracked: The URI and the run's id that were noted when it was tracked.
        metrics: Figures by name, logged at the run's last step.
        directory: With the result files; goes to the artifacts as evaluation/<its name>.
        page: The report of them; goes to the artifacts as report/<its name>.

    Raises:
        ConfigError: If MLflow cannot be reached or does not know the run.
    """
    run_id, now = tracked[1], int(time.time() * 1000)
    with _reached(config, tracked) as client:
        from mlflow.entities import Metric

        step = max(last_steps(client, run_id).values(), default=0)
        found = metric_links(client, run_id)
        client.log_batch(run_id, metrics=[Metric(key, value, now, step, **found) for key, value in metrics.items()])
        client.log_artifacts(run_id, str(directory), f"evaluation/{directory.name}")
        client.log_artifact(run_id, str(page), "report")


def log_comparison(config: Config, tracked: tuple[str, str], sentences: Mapping[str, str], directory: Path) -> None:
    """Adds a comparison to a run that has ended.

    Args:
        config: The run's.
        tracked: The URI and the run's id that were noted when it was tracked.
        sentences: What came of it, in words by the name of a tag.
        directory: With its files; goes to the artifacts as report/compare/<its name>.

    Raises:
        ConfigError: If MLflow cannot be reached or does not know the run.
    """
    with _reached(config, tracked) as client:
        for name, sentence in sentences.items():
            client.set_tag(tracked[1], re.sub(NO_PARAM_NAME, "_", name), sentence[:MAX_TAG])
        client.log_artifacts(tracked[1], str(directory), f"report/compare/{directory.name}")


@contextmanager
def _reached(config: Config, tracked: tuple[str, str]) -> Iterator["MlflowClient"]:
    """MLflow as it keeps a run that was tracked."""
    mlflow, uri = import_mlflow(), tracking_uri(config, tracked[0])
    with translate_mlflow_error(uri):
        with exclusive_lock(uri):
            client = mlflow.MlflowClient(uri)
        yield client


def _status(error: BaseException | None) -> str:
    """How a block ended, in MLflow's terms: a run that was asked to stop is KILLED, whatever way the request took."""
    from pipeline.training.trainer import TrainingInterrupted

    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "FINISHED"
    if isinstance(error, KeyboardInterrupt | TrainingInterrupted) or (
        isinstance(error, SystemExit) and error.code in (128 + 2, 128 + 15)
    ):
        return "KILLED"
    return "FAILED"

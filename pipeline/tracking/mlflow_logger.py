"""The logger of a run in MLflow: parameters, metrics, data set, results and models.

MLflow is imported when the logger's `with` block is entered, so that importing this module is fast. Messages of MLflow
and its database layer go to `logging`, not to the console.
"""

import json
import logging
import os
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

from pipeline.config.schema import Config
from pipeline.console import python_executable
from pipeline.distributed.signals import TrainingInterrupted
from pipeline.runs.provenance import flatten, mask_credentials, provenance
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

FLUSH_INTERVAL = 10.0  # seconds
RETRY_INTERVAL = 60.0  # seconds after a failed flush
MAX_METRICS, MAX_PARAMS = 1000, 100  # per call; MLflow refuses more
MAX_PARAM, MAX_TAG, MAX_DIGEST = 6000, 8000, 36  # characters; MLflow's limits
# Characters that MLflow refuses in the name of a parameter; a class with a weight may have them in its name.
INVALID_NAME_CHARACTERS = r"[^\w./: -]"


class MLflowLogger(Callback):
    """A callback that logs to a run in MLflow, active inside a `with` block.

    The run ends as FINISHED, as KILLED when it was interrupted, or as FAILED with the error in its tag `error`. Metrics
    are buffered and sent in batches. If MLflow becomes unreachable during a run, training continues and the metrics are
    sent later.

    Attributes:
        uri: Tracking URI, without user and password.
        run_id: Id of the run in MLflow; set inside the block.
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
        """Configure the logger; MLflow is not contacted yet.

        Args:
            config: Its values become the run's parameters; `tracking` has the URI and the experiment.
            run_directory: Its name becomes the run's name.
            resumed: URI and run id of the run to resume. If MLflow there does not know it (any more), a new run starts.
            changes: Differences between a resumed run and its start, a line each; they become its tag `changes`.
        """
        self._config, self._directory, self._resumed = config, run_directory, resumed[1] if resumed else None
        self._changes = "\n".join(changes)
        self._uri = tracking_uri(config.tracking.uri, resumed[0] if resumed else None)
        self.uri = re.sub(r"://[^/@]+@", "://", self._uri)
        self._buffer: list[Metric] = []
        self._last_steps: dict[str, int] = {}
        self._next_flush = 0.0
        self._unreachable = False

    def __enter__(self) -> "MLflowLogger":
        """Start the run, or resume it.

        Raises:
            ConfigError: If the tracking server or database cannot be used.
        """
        mlflow, tags = import_mlflow(), {key: value[:MAX_TAG] for key, value in self._origin().items()}
        self._previous_uri: Any = os.environ.get("MLFLOW_TRACKING_URI")  # MLflow's global state is restored at the end
        try:
            with translate_mlflow_error(self._uri), exclusive_lock(self._uri):
                mlflow.set_tracking_uri(self._uri)
                self._client = mlflow.MlflowClient(self._uri)
                self._start(mlflow, tags)
        except BaseException:
            with suppress(Exception):
                mlflow.end_run("FAILED")
            mlflow.set_tracking_uri(self._previous_uri)
            raise
        self._next_flush = time.monotonic() + FLUSH_INTERVAL
        return self

    def _origin(self) -> dict[str, str]:
        return provenance(self._directory) | ({"changes": mask_credentials(self._changes)} if self._changes else {})

    def _start(self, mlflow: ModuleType, tags: Mapping[str, str]) -> None:
        experiment = find_experiment(self._client, self._uri, self._config.tracking.experiment)
        if self._resumed is not None and not run_exists(self._client, self._resumed):
            logger.warning(
                "MLflow at %s does not know the run %s; a new run is started",
                mask_credentials(self._uri),
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
        # A run that was killed during its start may have some of the parameters.
        logged = self._client.get_run(self.run_id).data.params
        values = {
            re.sub(INVALID_NAME_CHARACTERS, "_", key): value
            for key, value in flatten(self._config.model_dump(mode="json"))
        }
        params = [(key, value[:MAX_PARAM]) for key, value in values.items() if key not in logged]
        for i in range(0, len(params), MAX_PARAMS):
            mlflow.log_params(dict(params[i : i + MAX_PARAMS]))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Send the buffered metrics and end the run."""
        import mlflow

        self.flush()
        status = _status(error)
        try:
            mlflow.end_run(status)
            if status == "FAILED":
                self._client.set_tag(
                    self.run_id, "error", mask_credentials(f"{type(error).__name__}: {error}")[:MAX_TAG]
                )
        except Exception:  # an error here must not hide the error of the run
            logger.exception("MLflow at %s did not accept the end of run %s", mask_credentials(self._uri), self.run_id)
        finally:
            mlflow.set_tracking_uri(self._previous_uri)

    def ui_command(self) -> str:
        """Return the command that opens MLflow's UI on the run's database, only locally; for a server, its URI."""
        if database_of(self._uri) is None:
            return mask_credentials(self._uri)
        uri = "sqlite:///mlflow.db" if database_of(self._uri) == Path("mlflow.db").resolve() else self._uri
        return f"{python_executable()} -m mlflow ui --backend-store-uri {shlex.quote(uri)} --host 127.0.0.1"

    def log_dataset(self, name: str, digest: str, source: str, class_counts: Mapping[str, Mapping[str, int]]) -> None:
        """Log the data set of the run, unless a resumed run has it already.

        Args:
            name: Name of the data set.
            digest: Changes whenever the data do; its first 36 characters are logged.
            source: Location of the data: a path, or a name in a collection.
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
        """Buffer metrics for the next batch. A metric that has a value for this step or a later one keeps it.

        Args:
            metrics: Values by name.
            step: Step of the values.
            **links: Links to a model and a data set, as returned by `metric_links`.
        """
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        for key, value in metrics.items():
            if step > self._last_steps.get(key, -1):
                self._last_steps[key] = step
                self._buffer.append(Metric(key, float(value), now, step, **links))
        if time.monotonic() >= self._next_flush:
            self.flush()

    def log_results(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics of the final network, linked to the model logged by `log_model` and to the data set.

        Raises:
            ConfigError: If MLflow cannot be reached.
        """
        with translate_mlflow_error(self._uri):
            links = metric_links(self._client, self.run_id)
        self.log_metrics(metrics, step, **links)
        self.flush()

    def registry(self, name: str) -> ModelRegistry:
        """Return the model registry of the tracking server for a model name."""
        return ModelRegistry(self._client, self._uri, name)

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step."""
        self.log_metrics(metrics, step)

    def on_epoch_end(self, record: Mapping[str, float]) -> None:
        """Log an epoch's record: `step`, `epoch` and metrics by name."""
        self.log_metrics({key: value for key, value in record.items() if key != "step"}, int(record["step"]))

    def on_checkpoint(self, state: object) -> None:
        """Flush the buffer, so that MLflow has at least the metrics that the checkpoint has."""
        if not self._unreachable:
            self.flush()

    def flush(self) -> None:
        """Send the buffered metrics. Those that MLflow refuses stay in the buffer, with a warning in the log."""
        try:
            while self._buffer:
                self._client.log_batch(self.run_id, metrics=self._buffer[:MAX_METRICS])
                del self._buffer[:MAX_METRICS]
            self._unreachable = False
        except Exception as error:  # no failure of MLflow is a reason to stop training
            self._unreachable = True
            reason = mask_credentials(str(error))
            logger.warning(
                "MLflow at %s did not accept %d metrics: %s", mask_credentials(self._uri), len(self._buffer), reason
            )
        self._next_flush = time.monotonic() + (RETRY_INTERVAL if self._unreachable else FLUSH_INTERVAL)

    def log_artifacts(self, path: Path, name: str | None = None) -> None:
        """Copy a file, or the content of a directory, to the run's artifacts.

        Args:
            path: The file or directory.
            name: Folder among the artifacts; None for the top level.

        Raises:
            ConfigError: If MLflow does not accept them.
        """
        with translate_mlflow_error(self._uri):
            if path.is_dir():
                self._client.log_artifacts(self.run_id, str(path), name)
            else:
                self._client.log_artifact(self.run_id, str(path), name)

    def log_model(self, path: Path, name: str, *, step: int) -> str:
        """Log a saved network as an MLflow model for `mlflow.keras.load_model`; an earlier one of the run is replaced.

        Args:
            path: The .keras file.
            name: Name of the model in MLflow.
            step: Step at which it was saved; the run's metrics of this step become the model's.

        Returns:
            The model's URI, `models:/<id>`.

        Raises:
            ConfigError: If MLflow does not accept it.
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
                self._client.delete_logged_model(earlier.model_id)  # from an interrupted end of the run
            info = mlflow.keras.log_model(
                model, name=name, signature=infer_signature(example, output), pip_requirements=requirements, step=step
            )
        return info.model_uri


def log_evaluation(
    configured_uri: str | None, tracked: tuple[str, str], metrics: Mapping[str, float], directory: Path, page: Path
) -> bool:
    """Add an evaluation to a run that has ended, linked to its model and data set; its status does not change.

    Args:
        configured_uri: `tracking.uri` of the run's config.
        tracked: Tracking URI and run id of the run.
        metrics: Values by name, logged at the run's last step.
        directory: Folder with the result files; logged as the artifact evaluation/<its name>.
        page: Their report; logged as the artifact report/<its name>.

    Returns:
        False if the run was deleted in MLflow; nothing is logged then.

    Raises:
        ConfigError: MLflow cannot be reached.
    """
    run_id, now = tracked[1], int(time.time() * 1000)
    with _client_of(configured_uri, tracked) as client:
        from mlflow.entities import Metric

        if not run_exists(client, run_id):
            return False
        step = max(last_steps(client, run_id).values(), default=0)
        links = metric_links(client, run_id)
        client.log_batch(run_id, metrics=[Metric(key, value, now, step, **links) for key, value in metrics.items()])
        client.log_artifacts(run_id, str(directory), f"evaluation/{directory.name}")
        client.log_artifact(run_id, str(page), "report")
    return True


def log_comparison(
    configured_uri: str | None, tracked: tuple[str, str], sentences: Mapping[str, str], directory: Path
) -> bool:
    """Add a comparison to a run that has ended.

    Args:
        configured_uri: `tracking.uri` of the run's config.
        tracked: Tracking URI and run id of the run.
        sentences: Results as sentences, by the name of a tag.
        directory: Folder with its files; logged as the artifact report/compare/<its name>.

    Returns:
        False if the run was deleted in MLflow; nothing is logged then.

    Raises:
        ConfigError: MLflow cannot be reached.
    """
    with _client_of(configured_uri, tracked) as client:
        if not run_exists(client, tracked[1]):
            return False
        for name, sentence in sentences.items():
            client.set_tag(tracked[1], re.sub(INVALID_NAME_CHARACTERS, "_", name), sentence[:MAX_TAG])
        client.log_artifacts(tracked[1], str(directory), f"report/compare/{directory.name}")
    return True


@contextmanager
def _client_of(configured_uri: str | None, tracked: tuple[str, str]) -> Iterator["MlflowClient"]:
    """Yield the MLflow client of a tracked run; its errors name the URI and the remedy."""
    mlflow, uri = import_mlflow(), tracking_uri(configured_uri, tracked[0])
    with translate_mlflow_error(uri):
        with exclusive_lock(uri):
            client = mlflow.MlflowClient(uri)
        yield client


def _status(error: BaseException | None) -> str:
    """Return the MLflow status for the error that ended a block; a stop request of any kind gives KILLED."""
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "FINISHED"
    if isinstance(error, KeyboardInterrupt | TrainingInterrupted) or (
        isinstance(error, SystemExit) and error.code in (128 + 2, 128 + 15)
    ):
        return "KILLED"
    return "FAILED"

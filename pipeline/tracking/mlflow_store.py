"""Where MLflow keeps runs: its address, its database and who may touch it, its experiments, and its errors in plain words."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from filelock import FileLock

from pipeline.config.schema import Config
from pipeline.errors import ConfigError
from pipeline.runs.provenance import without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient

ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # MLflow's own 7 with their growing pauses take minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


def import_mlflow() -> ModuleType:
    """MLflow, its log lines handed on to the root logger."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import mlflow
    import mlflow.keras

    for name in ("mlflow", "alembic", "sqlalchemy.engine", "huey"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    return mlflow


def tracking_uri(config: Config, noted: str | None = None) -> str:
    """The config's, else the environment's, else the run's earlier one, else the database in the current folder.

    SQLite's path is made absolute.
    """
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or noted or "sqlite:///mlflow.db"
    return f"sqlite:///{database.resolve()}" if (database := database_of(uri)) else uri


def database_of(uri: str) -> Path | None:
    """The file of an SQLite URI."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


@contextmanager
def exclusive_lock(uri: str, lock: str = ".lock") -> Iterator[None]:
    """Lets one process at a time do a thing with an SQLite file; two that make its tables at once break it."""
    if (database := database_of(uri)) is None:
        yield
    else:
        database.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{database}{lock}"):
            yield


def find_experiment(client: "MlflowClient", uri: str, name: str) -> str:
    """The id of the experiment, made if missing; beside an SQLite file its artifacts go to mlartifacts/."""
    from mlflow.exceptions import MlflowException

    database = database_of(uri)
    artifact_location = (database.parent / "mlartifacts").as_uri() if database else None
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(
                name, artifact_location, {"mlflow.experimentKind": "custom_model_development"}
            )
        except MlflowException as error:  # on a server another process may have been faster
            if (
                error.error_code != "RESOURCE_ALREADY_EXISTS"
                or (experiment := client.get_experiment_by_name(name)) is None
            ):
                raise
    if experiment.lifecycle_stage == "deleted":
        remedy = f"mlflow experiments restore --experiment-id {experiment.experiment_id}"
        raise ConfigError(
            f"tracking.experiment: {name!r} was deleted in MLflow; choose another name, or restore it: {remedy}"
        )
    return experiment.experiment_id


@contextmanager
def translate_mlflow_error(uri: str) -> Iterator[None]:
    """Turns MLflow's errors into one that names the URI and the remedy."""
    try:
        yield
    except ConfigError:
        raise
    except (
        Exception
    ) as error:  # MLflow lets through those of requests, SQLAlchemy, the operating system and the artifact store
        reason = without_credentials(str(error)).partition("\n")[0][:500] or type(error).__name__
        raise ConfigError(
            f"tracking.uri: MLflow cannot work with {without_credentials(uri)}: {reason}\n"
            "Start the server or put the address right (tracking.uri, else MLFLOW_TRACKING_URI); "
            "to track in a local file: tracking.uri=sqlite:///mlflow.db"
        ) from error


def run_exists(client: "MlflowClient", run_id: str) -> bool:
    """Whether MLflow has the run."""
    from mlflow.exceptions import MlflowException

    try:
        client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    return True


def metric_links(client: "MlflowClient", run_id: str) -> dict[str, str]:
    """What ties a metric to the run's model and data set, of those that it has: `model_id`; `dataset_name` and `dataset_digest`."""
    run = client.get_run(run_id)
    models = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'", max_results=1)
    data = [each.dataset for each in run.inputs.dataset_inputs] if run.inputs is not None else []
    return ({"model_id": models[0].model_id} if models else {}) | (
        {"dataset_name": data[0].name, "dataset_digest": data[0].digest} if data else {}
    )


def last_steps(client: "MlflowClient", run_id: str) -> dict[str, int]:
    """The greatest step of each of the run's own metrics."""
    keys = [key for key in client.get_run(run_id).data.metrics if not key.startswith("system/")]
    return {key: max(metric.step for metric in client.get_metric_history(run_id, key)) for key in keys}

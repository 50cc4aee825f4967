"""Access to the MLflow store: tracking URI, database lock, experiments, runs and error messages."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from pipeline import files
from pipeline.errors import ConfigError
from pipeline.runs.provenance import mask_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE_HEADER = b"SQLite format 3\0"
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # MLflow's default of 7 takes minutes, because the pauses grow
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


def import_mlflow() -> ModuleType:
    """Import MLflow and pass its log records to the root logger."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import mlflow
    import mlflow.keras

    for name in ("mlflow", "alembic", "sqlalchemy.engine", "huey"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    return mlflow


def tracking_uri(configured: str | None, recorded: str | None = None) -> str:
    """Return the tracking URI: of the config, the environment, the run's record, or the database in the current folder.

    The path of an SQLite file is made absolute.

    Args:
        configured: `tracking.uri` of the config, which comes first.
        recorded: URI that the run was tracked at before.
    """
    uri = configured or os.environ.get("MLFLOW_TRACKING_URI") or recorded or "sqlite:///mlflow.db"
    return f"sqlite:///{database.resolve()}" if (database := database_of(uri)) else uri


def database_of(uri: str) -> Path | None:
    """Return the file of an SQLite URI; None for other URIs."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


@contextmanager
def exclusive_lock(uri: str, lock: str = ".lock") -> Iterator[None]:
    """Hold an exclusive lock on an SQLite file; two processes that create its tables at the same time break it.

    Args:
        uri: Tracking URI; others than SQLite are not locked.
        lock: Suffix of the lock file.
    """
    if (database := database_of(uri)) is None:
        yield
    else:
        database.parent.mkdir(parents=True, exist_ok=True)
        with files.exclusive_lock(Path(f"{database}{lock}")):
            yield


def find_experiment(client: "MlflowClient", uri: str, name: str) -> str:
    """Return the id of the experiment, created if missing; an SQLite store has mlartifacts/ beside it for artifacts."""
    from mlflow.exceptions import MlflowException

    database = database_of(uri)
    artifact_location = (database.parent / "mlartifacts").as_uri() if database else None
    if (known := _known_experiment(client, name)) is not None:
        return known
    try:
        return client.create_experiment(name, artifact_location, {"mlflow.experimentKind": "custom_model_development"})
    except MlflowException as error:  # on a server another process may have created it
        if error.error_code != "RESOURCE_ALREADY_EXISTS" or (known := _known_experiment(client, name)) is None:
            raise
        return known


def _known_experiment(client: "MlflowClient", name: str) -> str | None:
    """Return the id of an experiment; None if there is none.

    Raises:
        ConfigError: The experiment was deleted.
    """
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return None
    if experiment.lifecycle_stage == "deleted":
        remedy = f"mlflow experiments restore --experiment-id {experiment.experiment_id}"
        raise ConfigError(
            f"tracking.experiment: {name!r} was deleted in MLflow; choose another name, or restore it: {remedy}"
        )
    return experiment.experiment_id


def check_store(uri: str, experiment: str) -> None:
    """Check that runs can be tracked, before the time that goes into reading the data is lost.

    Nothing is created: no database, no experiment.

    Args:
        uri: Tracking URI.
        experiment: Name of the experiment.

    Raises:
        ConfigError: The store cannot be reached or used, or the experiment was deleted.
    """
    if (database := database_of(uri)) is not None and not database.exists():
        folder = next(parent for parent in database.parents if parent.exists())
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(f"tracking.uri: {database} cannot be created, because {folder} cannot be written")
        return
    with translate_mlflow_error(uri):
        if database is not None:
            with database.open("rb") as file:  # before a lock is left beside a file of the user's
                if file.read(len(SQLITE_HEADER)) not in (SQLITE_HEADER, b""):
                    raise ValueError("the file is not a database")
        with exclusive_lock(uri):
            _known_experiment(import_mlflow().MlflowClient(uri), experiment)


@contextmanager
def translate_mlflow_error(uri: str) -> Iterator[None]:
    """Translate MLflow's errors into a `ConfigError` that names the URI and the remedy."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # MLflow passes on those of requests, SQLAlchemy, the system and the artifact store
        reason = mask_credentials(str(error)).partition("\n")[0][:500] or type(error).__name__
        raise ConfigError(
            f"tracking.uri: MLflow cannot work with {mask_credentials(uri)}: {reason}\n"
            "Start the server or correct the address (tracking.uri, else MLFLOW_TRACKING_URI); "
            "to track in a local file: tracking.uri=sqlite:///mlflow.db"
        ) from error


def run_exists(client: "MlflowClient", run_id: str) -> bool:
    """Return whether MLflow has the run and nobody has deleted it."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def metric_links(client: "MlflowClient", run_id: str) -> dict[str, str]:
    """Return the fields that link a metric to the run's model and data set.

    Returns:
        `model_id` if the run has a model; `dataset_name` and `dataset_digest` if it has a data set.
    """
    run = client.get_run(run_id)
    models = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'", max_results=1)
    data = [each.dataset for each in run.inputs.dataset_inputs] if run.inputs is not None else []
    return ({"model_id": models[0].model_id} if models else {}) | (
        {"dataset_name": data[0].name, "dataset_digest": data[0].digest} if data else {}
    )


def last_steps(client: "MlflowClient", run_id: str) -> dict[str, int]:
    """Return the greatest step of each metric of the run, without system metrics."""
    keys = [key for key in client.get_run(run_id).data.metrics if not key.startswith("system/")]
    return {key: max(metric.step for metric in client.get_metric_history(run_id, key)) for key in keys}

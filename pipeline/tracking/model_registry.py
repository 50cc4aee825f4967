"""A name in MLflow's model registry: its versions, and the one of them that is the champion."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.errors import RunError
from pipeline.tracking.mlflow_store import exclusive_lock, translate_mlflow_error

if TYPE_CHECKING:
    from mlflow import MlflowClient

ALIAS = "champion"


class ModelVersion(NamedTuple):
    """A registered model."""

    number: str
    run_id: str
    """MLflow's id of the run that it comes from."""


class ModelRegistry:
    """The versions of one name.

    Attributes:
        name: Under which they are registered.
    """

    def __init__(self, client: "MlflowClient", uri: str, name: str) -> None:
        """Takes MLflow and its address; nothing is contacted yet."""
        self.name, self._client, self._uri = name, client, uri

    @contextmanager
    def promotion_lock(self) -> Iterator[None]:
        """One at a time of the runs that end together, where MLflow is an SQLite file; a server has nothing to keep them apart by.

        Raises:
            ConfigError: If the file's folder does not take a lock.
        """
        with ExitStack() as held:
            with translate_mlflow_error(self._uri):
                held.enter_context(exclusive_lock(self._uri, ".contest.lock"))
            yield

    def champion(self) -> ModelVersion | None:
        """The version that has the alias; None where none has.

        Raises:
            ConfigError: If the registry cannot be reached.
        """
        with translate_mlflow_error(self._uri):
            if not self._client.search_registered_models(f"name = '{self.name}'"):
                return None
            number = self._client.get_registered_model(self.name).aliases.get(ALIAS)
            if number is None:
                return None
            return ModelVersion(str(number), self._client.get_model_version(self.name, str(number)).run_id or "")

    def add(self, model_uri: str) -> ModelVersion:
        """Registers a logged model as the next version.

        Args:
            model_uri: As `Tracker.log_model` returns it.

        Raises:
            ConfigError: If the registry does not take it.
        """
        import mlflow

        with translate_mlflow_error(self._uri):
            added = mlflow.register_model(model_uri, self.name)
        return ModelVersion(str(added.version), added.run_id or "")

    def finalize_version(self, version: ModelVersion, why: str, *, promoted: bool) -> None:
        """Gives a version its description and, where it won, the alias; versions of the same run, whose end was cut off, are deleted."""
        with translate_mlflow_error(self._uri):
            self._client.update_model_version(self.name, version.number, why)
            if promoted:
                self._client.set_registered_model_alias(self.name, ALIAS, version.number)
            for other in self._client.search_model_versions(f"name = '{self.name}' and run_id = '{version.run_id}'"):
                if str(other.version) != version.number:
                    self._client.delete_model_version(self.name, str(other.version))

    def download(self, version: ModelVersion, name: str, folder: Path) -> Path:
        """Fetches a file from the artifacts of a version's run.

        Raises:
            RunError: If they have no such file.
            ConfigError: If MLflow cannot be reached.
        """
        from mlflow.exceptions import MlflowException

        with translate_mlflow_error(self._uri):
            try:
                files = {file.path for file in self._client.list_artifacts(version.run_id, str(Path(name).parent))}
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                files = set()  # the run is gone
            if name in files:
                return Path(self._client.download_artifacts(version.run_id, name, str(folder)))
        raise RunError(f"the run of version {version.number} has no {name} in MLflow")

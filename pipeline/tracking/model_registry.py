"""A registered model in MLflow's model registry: its versions, one of which is the champion."""

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
    """A version of a registered model."""

    number: str
    run_id: str
    """Id of the MLflow run that produced it."""


class ModelRegistry:
    """The versions of one registered model.

    Attributes:
        name: Name of the registered model.
    """

    def __init__(self, client: "MlflowClient", uri: str, name: str) -> None:
        """Take the MLflow client, its URI and the model name; MLflow is not contacted yet."""
        self.name, self._client, self._uri = name, client, uri

    @contextmanager
    def promotion_lock(self) -> Iterator[None]:
        """Hold the lock that serializes promotions of runs that end together.

        It works for an SQLite file; a server offers no lock.

        Raises:
            ConfigError: If the file's folder does not accept a lock file.
        """
        with ExitStack() as stack:
            with translate_mlflow_error(self._uri):
                stack.enter_context(exclusive_lock(self._uri, ".contest.lock"))
            yield

    def champion(self) -> ModelVersion | None:
        """Return the version that has the alias "champion"; None where no version has it.

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
        """Register a logged model as the next version.

        Args:
            model_uri: As returned by `MLflowLogger.log_model`.

        Raises:
            ConfigError: If the registry does not accept it.
        """
        import mlflow

        with translate_mlflow_error(self._uri):
            added = mlflow.register_model(model_uri, self.name)
        return ModelVersion(str(added.version), added.run_id or "")

    def finalize_version(self, version: ModelVersion, description: str, *, promoted: bool) -> None:
        """Set the description of a version and, if promoted, the alias; other versions of the same run are deleted.

        Other versions of the run come from an interrupted end of it.
        """
        with translate_mlflow_error(self._uri):
            self._client.update_model_version(self.name, version.number, description)
            if promoted:
                self._client.set_registered_model_alias(self.name, ALIAS, version.number)
            for other in self._client.search_model_versions(f"name = '{self.name}' and run_id = '{version.run_id}'"):
                if str(other.version) != version.number:
                    self._client.delete_model_version(self.name, str(other.version))

    def download(self, version: ModelVersion, name: str, folder: Path) -> Path:
        """Download a file from the artifacts of a version's run.

        Raises:
            RunError: If the artifacts have no such file.
            ConfigError: If MLflow cannot be reached.
        """
        from mlflow.exceptions import MlflowException

        with translate_mlflow_error(self._uri):
            try:
                files = {file.path for file in self._client.list_artifacts(version.run_id, str(Path(name).parent))}
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                files = set()  # the run was deleted
            if name in files:
                return Path(self._client.download_artifacts(version.run_id, name, str(folder)))
        raise RunError(f"the run of version {version.number} has no {name} in MLflow")

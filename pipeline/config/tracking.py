"""The section `tracking`: experiment, server and model registry of MLflow."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from pipeline.config.base import StrictModel

MlflowName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$", max_length=100)]


class TrackingConfig(StrictModel):
    """Experiment, server and model registry of MLflow."""

    experiment: MlflowName = "default"
    """Name of the experiment in MLflow and of the folder under runs/."""
    uri: str | None = None
    """Tracking URI; null: MLFLOW_TRACKING_URI, else the file mlflow.db in the current folder."""
    registered_model_name: MlflowName | None = None
    """Name of the final model in the model registry; null registers nothing. The model takes the alias champion if
    there is none, or if a paired test on the same images shows that it is better than the current champion."""

    @field_validator("uri", mode="after")
    @classmethod
    def _expand_home_without_password(cls, uri: str | None) -> str | None:
        if uri is not None and re.search(r"://[^/@]+@", uri):
            raise ValueError(
                "a config is copied into every run: give user and password by MLFLOW_TRACKING_USERNAME and _PASSWORD"
            )
        if uri is not None and uri.startswith("sqlite:///~/"):
            return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).expanduser()}"
        return uri if uri is None or "://" in uri else str(Path(uri).expanduser())

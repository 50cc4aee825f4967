"""The strict model and the number types that the sections of the schema share."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, lt=1)]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Schedule = Literal["exponential", "cosine", "constant"]


def is_address(text: str) -> bool:
    """Return whether a text is the address of a file, such as s3://BUCKET/FILE, not a path on this machine."""
    return "://" in text


def _refuse_address(value: Any) -> Any:
    if isinstance(value, str) and is_address(value):
        raise ValueError(f"must be a path on this machine; received the address {value}; download it first")
    return value


LocalPath = Annotated[Path, BeforeValidator(_refuse_address), AfterValidator(Path.expanduser)]  # ~ is the home folder


class StrictModel(BaseModel):
    """A section of the config; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

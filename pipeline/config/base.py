"""What the sections of the schema share: the strict model and common numbers."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, lt=1)]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Schedule = Literal["exponential", "cosine", "constant"]


class StrictModel(BaseModel):
    """A mapping in the YAML whose keys are known."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

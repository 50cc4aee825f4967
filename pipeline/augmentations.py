"""The augmentations that a config may name, and their arguments."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import nearest

NATIVE_ARGUMENTS = {"RandomResizedCrop": ("scale", "ratio"), "HorizontalFlip": ("p",)}


def check_native(name: str, arguments: Mapping[str, Any]) -> None:
    """Raises ValueError if the native backend has no such transform, or not with these arguments."""
    if name not in NATIVE_ARGUMENTS:
        raise ValueError(f"the native backend knows {' and '.join(NATIVE_ARGUMENTS)}; for {name} set backend: albumentations")
    for key, value in arguments.items():
        if key not in NATIVE_ARGUMENTS[name]:
            raise ValueError(f"{name} has no argument {key!r}{nearest(key, NATIVE_ARGUMENTS[name])}")
        if key == "p" and not (_is_number(value) and 0 <= value <= 1):
            raise ValueError(f"{name}: p is a probability from 0 to 1; received {value!r}")
        if key in ("scale", "ratio"):
            top = 1 if key == "scale" else 100
            if not (isinstance(value, Sequence) and len(value) == 2 and all(map(_is_number, value)) and 0 < value[0] <= value[1] <= top):
                raise ValueError(f"{name}: {key} is a pair [low, high] above 0 and at most {top}; received {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_albumentations(name: str, arguments: Mapping[str, Any]) -> None:
    """Raises ValueError if albumentations has no such transform, or not with such arguments. Their values are checked when it is built."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or importing it asks the network for its newest version
    import albumentations

    exported = {each: value for each, value in vars(albumentations).items() if isinstance(value, type)}
    known = {each: value for each, value in exported.items() if issubclass(value, albumentations.BasicTransform)}
    if name not in known:
        raise ValueError(f"albumentations has no transform {name!r}{nearest(name, known)}")
    schema: Any = known[name].InitSchema  # type: ignore[attr-defined]
    unknown = [key for key in arguments if key not in schema.model_fields or key == "strict"]
    if unknown:
        raise ValueError("; ".join(f"{name} has no argument {key!r}{nearest(key, schema.model_fields)}" for key in unknown))

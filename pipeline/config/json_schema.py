"""The JSON schema of a config file, for editors: they complete the keys, show their descriptions and check the values.

The schema describes a file, which may leave out what it inherits: no key is required. What follows from several keys
together is checked by `load_config` only.
"""

import json
from typing import Any

from pipeline.config.schema import Config

DIALECT = "https://json-schema.org/draft/2020-12/schema"
TEXT = {"type": "string"}


def config_schema() -> str:
    """Return the JSON schema of a config file as text."""
    schema = _for_files(Config.model_json_schema())
    extends = {**TEXT, "description": "A config, relative to this file, whose values this one inherits and changes."}
    schema["properties"] = {"extends": extends, **schema["properties"]}
    return json.dumps({"$schema": DIALECT, **schema}, indent=1, ensure_ascii=False) + "\n"


def _for_files(node: Any) -> Any:
    """Return a part of pydantic's schema as it holds for YAML that has not been validated yet."""
    if isinstance(node, list):
        return [_for_files(item) for item in node]
    if not isinstance(node, dict):
        return node
    if node.get("title") == "TransformConfig":
        return _TRANSFORM
    kept = {
        key: _for_files(value)
        for key, value in node.items()
        # A title repeats the key. pydantic's discriminator is no keyword of JSON schema.
        if key not in ("required", "discriminator") and not (key == "title" and isinstance(value, str))
    }
    if kept.get("type") == "string" and "enum" not in kept:
        # YAML reads 2024 and 1e3 as numbers; where the config has a text, they are texts.
        kept["type"] = ["string", "number"]
    return kept


_TRANSFORM: dict[str, Any] = {
    "description": "The name of a transform, or its name with its arguments: {RandomResizedCrop: {scale: [0.5, 1.0]}}.",
    "anyOf": [
        {"type": "string"},
        {
            "type": "object",
            "minProperties": 1,
            "maxProperties": 1,
            "additionalProperties": {"type": ["object", "null"]},
        },
        {
            "type": "object",
            "properties": {"name": {"type": "string"}, "args": {"type": "object"}},
            "additionalProperties": False,
        },
    ],
}

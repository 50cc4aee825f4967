"""The loader: YAML and command line to a `Config`, with all mistakes reported at once.

The steps are parsing (each key keeps its file and line), `extends`, overrides and validation. A mistake is reported as
`file:line: key: what is wrong`, with the key as the user wrote it.
"""

import types
import typing
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ValidationError

from pipeline.config.base import StrictModel
from pipeline.config.hints import RENAMED_VALUES, renamed, suggest_key, suggest_section_key
from pipeline.config.schema import Config
from pipeline.errors import ConfigError, suggest

KeyPath = tuple[str | int, ...]
Origins = dict[KeyPath, str]  # where each key was written: file:line, or the override on the command line


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load a config.

    Args:
        path: A YAML file. Its key `extends` names a config, relative to the file, whose values it inherits and changes.
        overrides: `key.path=value` each, the value in YAML; applied in order after the file.

    Returns:
        The validated config.

    Raises:
        ConfigError: With a line for every mistake: place, key, problem, and the nearest valid key.
    """
    values, origins = _read(Path(path), ())
    if any(override.startswith("recipe=") and override != "recipe=null" for override in overrides):
        _drop_keys_of_recipe(values)
    for override in overrides:
        _apply_override(values, origins, override)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        errors: list[dict[str, Any]] = [dict(item) for item in error.errors(include_url=False)]
        inner = {item["loc"][:n] for item in errors for n in range(1, len(item["loc"]))}
        lines = [
            _describe(item, values, origins, str(path))
            for item in errors
            if not (item["type"] == "too_short" and item["loc"] in inner)
        ]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def _read(path: Path, trail: tuple[Path, ...], named_by: str = "") -> tuple[dict[str, Any], Origins]:
    if path.resolve() in trail:
        raise ConfigError(f"{path}: extends itself by way of {' -> '.join(p.name for p in (*trail, path))}")
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        origins: Origins = {}
        values = {} if node is None else _construct(node, (), origins, str(path), 0)
    except OSError as error:
        raise ConfigError(
            f"{named_by}{path}: cannot be read ({error.strerror}); the project's configs are in configs/"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_problem(str(path), error)) from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: must hold keys and values such as model: and data:; received a {type(values).__name__}"
        )
    parent = values.pop("extends", None)
    if parent is None:
        return values, origins
    if not isinstance(parent, str):
        raise ConfigError(
            f"{origins['extends',]}: extends: must be the name of another config file; received {parent!r}"
        )
    base, base_origins = _read(path.parent / parent, (*trail, path.resolve()), f"{origins['extends',]}: extends: ")
    if values.get("recipe") is not None:
        _drop_keys_of_recipe(base)
    _merge(base, values, (), base_origins, origins)
    return base, base_origins


def _yaml_problem(location: str, error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.reader.ReaderError):  # the only one without a line
        character = f"the character {error.character!r} at position {error.position}"
        return f"{location}: is not valid YAML: {character} is not allowed; delete it"
    mark = getattr(error, "problem_mark", None)
    line = f"{location}:{mark.line + 1}" if mark is not None else location
    return f"{line}: is not valid YAML: {getattr(error, 'problem', None) or error}"


def _construct(node: yaml.Node, path: KeyPath, origins: Origins, file: str, depth: int) -> Any:
    """Construct values as the safe loader does; record lines, refuse duplicate keys and limit the nesting."""
    location = f"{file}:{node.start_mark.line + 1}"
    if depth > 20:
        raise ConfigError(f"{location}: is nested more than 20 levels deep; does it refer to itself?")
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value  # as written: yes, 10 and 1e3 are names, too
            line = f"{file}:{key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{line}: {dotted_path(path) or 'the config'}: keys must be names; received {key!r}")
            if key in mapping:
                raise ConfigError(
                    f"{line}: {dotted_path((*path, key))}: is given twice (first at {origins[(*path, key)]})"
                )
            origins[(*path, key)] = line
            mapping[key] = _construct(value_node, (*path, key), origins, file, depth + 1)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            origins[(*path, i)] = f"{file}:{item.start_mark.line + 1}"
        return [_construct(item, (*path, i), origins, file, depth + 1) for i, item in enumerate(node.value)]
    try:
        if _is_text(path) and not node.tag.endswith(":null"):
            return node.value  # 2024, 1e3 and yes are texts, too
        return yaml.SafeLoader("").construct_object(node, deep=True)
    except ValueError as error:  # such as the date 2026-13-45
        raise ConfigError(f"{location}: {dotted_path(path)}: {error}") from None


def _drop_keys_of_recipe(values: dict[str, Any]) -> None:
    """Remove the keys that a recipe chooses.

    A config with a recipe ignores the values of these keys in the config that it extends.
    """
    values.pop("optimizer", None)
    if isinstance(values.get("train"), dict):
        values["train"].pop("stages", None)


def _merge(base: dict[str, Any], over: dict[str, Any], path: KeyPath, origins: Origins, over_origins: Origins) -> None:
    """Merge `over` into `base`.

    Sections merge key by key; lists, variants and optional sections are replaced as a whole.
    """
    for key, value in over.items():
        here = (*path, key)
        if isinstance(base.get(key), dict) and isinstance(value, dict) and _section(here) is not None:
            origins[here] = over_origins[here]
            _merge(base[key], value, here, origins, over_origins)
        else:
            for known in [known for known in origins if known[: len(here)] == here]:
                del origins[known]
            origins.update({known: location for known, location in over_origins.items() if known[: len(here)] == here})
            base[key] = value


def _apply_override(values: dict[str, Any], origins: Origins, override: str) -> None:
    name, separator, text = override.partition("=")
    location = f"command line: {override}"
    if not separator or not all(name.split(".")):
        raise ConfigError(f"{location}: overrides are written key=value, such as train.global_batch_size=64")
    target: Any = values
    path: KeyPath = ()
    *parents, last = (int(part) if part.isdigit() else part for part in name.split("."))
    value = _parse_value(text, (*parents, last), location)
    for part in parents:
        path = (*path, part)
        if isinstance(target, list) and isinstance(part, int) and part < len(target):
            target = target[part]
        elif isinstance(target, dict) and isinstance(part, str):
            if not isinstance(target.get(part), dict | list):
                target[part] = {}
            target = target[part]
        else:
            raise ConfigError(f"{location}: there is no {dotted_path(path)} to set {last} in")
    if isinstance(target, list):
        if not (isinstance(last, int) and last < len(target)):
            raise ConfigError(f"{location}: {dotted_path(path)} has the items 0 to {len(target) - 1}, not {last}")
        target[last] = value
    else:
        target[str(last)] = value
    for known in [known for known in origins if known[: len(path) + 1] == (*path, last)]:
        del origins[known]
    origins[(*path, last)] = location


def _parse_value(text: str, path: KeyPath, location: str) -> Any:
    """Parse the value of an override: YAML, but where the schema has only texts, all of it is the text.

    There a value needs quotes only to begin with a quotation mark; `photos #2` and `C: backup` are folders.
    """
    if _is_text(path) and text not in ("", "~", "null", "Null", "NULL") and text[0] not in "'\"":
        return text
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return None if node is None else _construct(node, path, {}, "command line", 0)
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_problem(location, error)) from None


def _section(path: KeyPath) -> type[StrictModel] | None:
    """Return the section of the schema at a path; None if the path leads to a value or is not in the schema."""
    section: type[StrictModel] | None = Config
    for part in path:
        field = section.model_fields.get(str(part)) if section is not None else None
        annotation = field.annotation if field is not None else None
        section = annotation if isinstance(annotation, type) and issubclass(annotation, StrictModel) else None
    return section


def _is_text(path: KeyPath) -> bool:
    """Return True if the schema has only texts at a path: names, paths or words."""
    options = [option for option in _options(path) if option is not types.NoneType]
    return bool(options) and all(
        option in (str, Path)
        or (typing.get_origin(option) is Literal and all(isinstance(word, str) for word in typing.get_args(option)))
        for option in options
    )


def _valid_keys(path: KeyPath) -> list[str]:
    """Return the keys that the schema has at a path, including those of optional sections, unions and lists."""
    return [key for option in _options(path) if _is_section(option) for key in option.model_fields]


def _options(path: KeyPath) -> list[Any]:
    """Return the types that the schema has at a path; none if it has no such key."""
    options: list[Any] = [Config]
    for part in path:
        fields = [o.model_fields[str(part)].annotation for o in options if _is_section(o) and part in o.model_fields]
        items = [
            argument
            for o in options
            for argument in typing.get_args(o)
            if typing.get_origin(o) is tuple and isinstance(part, int)
        ]
        options = [option for annotation in (*fields, *items) for option in _unwrap(annotation)]
    return options


def _unwrap(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is Annotated:
        return _unwrap(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [option for argument in typing.get_args(annotation) for option in _unwrap(argument)]
    return [annotation]


def _is_section(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, StrictModel)


def _describe(error: dict[str, Any], values: Any, origins: Origins, file: str) -> str:
    """Format one of pydantic's errors as a line."""
    path = _written_path(error["loc"], values)
    below = (
        origins[known] for known in origins if path and known[: len(path)] == path
    )  # an override makes its parents as it goes
    location = next((origins[path[:n]] for n in range(len(path), 0, -1) if path[:n] in origins), None) or next(
        below, file
    )
    kind, given = error["type"], error["input"]
    if kind == "extra_forbidden":
        message = _unknown_key(path, given, values)
    elif kind == "missing":
        message = "is missing; give it a value"
    elif kind == "model_type" and (hint := suggest_section_key(dotted_path(path), given)):
        message = f"is a section with keys of its own; {hint}"
    elif kind == "tuple_type" and path == ("train", "stages"):
        epochs = given if isinstance(given, int) else "N"
        message = (
            f"must be a list of stages, such as [{{epochs: 5}}]; for a number of epochs write train.epochs={epochs}"
        )
    elif kind == "value_error":
        message = str(error["ctx"]["error"])
    else:
        message = f"{error['msg'][0].lower()}{error['msg'][1:]}; received {_short(given)}"
        if current := RENAMED_VALUES.get((dotted_path(path), str(given))):
            message = f"{given} is now {current}"
        elif kind == "literal_error" and isinstance(given, str):
            options = error["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
            message += "".join(part for part in [suggest(given, options)] if "did you mean" in part)
    message = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in message)  # a line stays one
    return f"{location}: {dotted_path(path)}: {message}" if path else f"{location}: {message}"


def _unknown_key(path: KeyPath, value: Any, values: Any) -> str:
    """Return a message about a key that the schema does not have, with the key that is meant."""
    key = ".".join(part for part in path if isinstance(part, str))
    if current := renamed(key):
        return f"is now {current}"
    hint = suggest_key(str(path[-1]), None if isinstance(value, dict | list) else value, values)
    return f"unknown key; {hint}" if hint else "unknown key" + suggest(str(path[-1]), _valid_keys(path[:-1]))


def _written_path(loc: KeyPath, values: Any) -> KeyPath:
    """Return pydantic's location without the names of union members, which are not keys of the file."""
    path: KeyPath = ()
    for part in loc:
        inside = _get(values, path)
        if isinstance(part, int) or (isinstance(inside, dict) and part in inside) or part in _valid_keys(path):
            path = (*path, part)
    return path


def _get(values: Any, path: KeyPath) -> Any:
    for part in path:
        known = (
            part in values
            if isinstance(values, dict)
            else isinstance(values, list) and isinstance(part, int) and part < len(values)
        )
        if not known:
            return None
        values = values[part]
    return values


def _short(value: Hashable) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def dotted_path(path: KeyPath) -> str:
    """Return a key path as written on the command line; a key with unprintable characters is quoted."""
    return ".".join(text if (text := str(part)).isprintable() else repr(text) for part in path)

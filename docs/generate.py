"""Write the references of the config and of the commands: python docs/generate.py.

The reference of the config follows from the schema in pipeline/config, that of the commands from the parsers in
pipeline/cli. A test compares the files with what this program would write.
"""

import argparse
import sys
import types
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel, Tag
from pydantic.fields import FieldInfo

from pipeline.__main__ import COMMANDS
from pipeline.config.schema import Config

REFERENCE = Path(__file__).resolve().parent / "reference"
NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", Path: "path", Any: "any value"}
PLURALS = {"text": "texts", "mapping": "mappings", "number": "numbers", "integer": "integers", "path": "paths"}
CONFIG_INTRODUCTION = """# Config reference

All keys of a config, with type, default and meaning. The page is generated from the schema in `pipeline/config/`.

A config is a YAML file. Every key can be changed on the command line, as in `train.global_batch_size=64`.
`extends: other.yaml` inherits all values of another config, relative to the file, and changes some of them. `[]` in a
key stands for the entries of a list.
"""
COMMANDS_INTRODUCTION = """# Command reference

All commands, with their arguments and options. The page is generated from the parsers in `pipeline/cli/`.

`.venv/bin/python -m pipeline COMMAND` runs a command. `.venv/bin/efficientnet COMMAND` is the same program, and
`train.py` and `evaluate.py` are the commands `train` and `evaluate`.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | done, but a result or an image failed; or the training failed |
| 2 | refused: an argument, the config, the data or a file is wrong |
| 143, 130 | stopped by SIGTERM or Ctrl-C, after a checkpoint |
"""


def config_reference() -> str:
    """Return the reference of all keys as Markdown."""
    parts = [CONFIG_INTRODUCTION]
    top = [(name, field) for name, field in Config.model_fields.items() if not _models(field.annotation)]
    parts += ["## Top level\n", *(_entry(name, field) for name, field in top)]
    for name, field in Config.model_fields.items():
        for model in _models(field.annotation):
            parts += [f"## {name}\n\n{_paragraph(model.__doc__)}\n", *_keys(f"{name}.", model)]
    return "\n".join(parts)


def _keys(prefix: str, model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield _entry(prefix + name, field)
        inner = "[]." if _is_list(field.annotation) else "."
        for nested in _models(field.annotation):
            yield from _keys(f"{prefix}{name}{inner}", nested)


def _entry(key: str, field: FieldInfo) -> str:
    facts, models = [type_name(field.annotation, field.metadata)], _models(field.annotation)
    default = field.get_default(call_default_factory=True)
    if field.is_required():
        facts.append("required")
    elif not isinstance(default, BaseModel):  # the keys of a section have defaults of their own
        facts.append(f"default `{_yaml(default)}`")
    text = field.description or models[0].__doc__
    return f"### `{key}`\n\n*{' · '.join(facts)}*\n\n{_paragraph(text)}\n"


def type_name(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Return the words for a type of the schema, with its bounds."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(arguments[0], [*arguments[1:], *metadata])
    if origin is Literal:
        return ", ".join(f"`{_yaml(value)}`" for value in arguments)
    if origin in (Union, types.UnionType):
        tagged = [part for part in arguments if part is not types.NoneType]
        words = [type_name(part, metadata) for part in tagged]
        words += ["`null`"] * (len(tagged) < len(arguments))
        return ", or ".join(dict.fromkeys(words)) if any("," in word for word in words) else " or ".join(words)
    if origin is tuple:
        of = type_name(arguments[0])
        return f"list of {PLURALS.get(of, of)}"
    if origin is dict:
        return f"mapping of {PLURALS.get(type_name(arguments[0]), 'texts')} to {_plain(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    return NAMES[annotation] + _bounds(metadata)


def _plain(annotation: Any) -> str:
    word, _, bounds = type_name(annotation).partition(" ")
    return f"{PLURALS.get(word, word)} {bounds}".strip() if word in PLURALS else type_name(annotation)


def _bounds(metadata: Sequence[Any]) -> str:
    """Return the bounds of a number in words, such as ` from 0 to below 1`."""
    flat = [part for item in metadata for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
    low = [f"from {item.ge:g}" for item in flat if isinstance(item, Ge)]
    low += [f"above {item.gt:g}" for item in flat if isinstance(item, Gt)]
    high = [f"up to {item.le:g}" for item in flat if isinstance(item, Le)]
    high += [f"below {item.lt:,}" for item in flat if isinstance(item, Lt)]
    length = [f"of at most {item.max_length} characters" for item in flat if isinstance(item, MaxLen)]
    length += ["not empty" for item in flat if isinstance(item, MinLen)]
    return "".join(f" {words}" for words in [_range(low, high), *length] if words)


def _range(low: Sequence[str], high: Sequence[str]) -> str:
    if low and high and low[0].startswith("from") and high[0].startswith("up"):
        return f"{low[0]} {high[0].removeprefix('up ')}"
    return " and ".join([*low[:1], *high[:1]])


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that a value may be made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) if not isinstance(part, Tag) for model in _models(part)]


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is tuple or any(_is_list(part) for part in get_args(annotation))


def _yaml(value: Any) -> str:
    """Return a default as it would stand in a config."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, BaseModel):
        given = value.model_dump(exclude_unset=True)
        return "{" + ", ".join(f"{key}: {_yaml(each)}" for key, each in given.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    return "{}" if value == {} else str(value)


def _paragraph(text: str | None) -> str:
    """Return a text on one line; what Markdown would take for HTML is escaped."""
    return " ".join((text or "").split()).replace("<", "&lt;").replace(">", "&gt;")


def command_reference() -> str:
    """Return the reference of all commands as Markdown."""
    return "\n".join([COMMANDS_INTRODUCTION, *(_command(name, purpose) for name, purpose in COMMANDS.items())])


class _ParserFound(Exception):  # noqa: N818 - no error
    pass


def parser_of(command: str) -> argparse.ArgumentParser:
    """Return the parser of a command, which its module builds when it parses its arguments."""

    def stop(parser: argparse.ArgumentParser, *arguments: Any) -> None:
        raise _ParserFound(parser)

    module = import_module(f"pipeline.cli.{command.replace('-', '_')}")
    kept = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_intermixed_args, sys.argv[0]
    argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_intermixed_args = stop  # type: ignore
    sys.argv[0] = "__main__.py"
    try:
        module.parse_arguments([])
    except _ParserFound as found:
        return found.args[0]
    finally:
        argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_intermixed_args, sys.argv[0] = kept  # type: ignore
    raise LookupError(f"{module.__name__}.parse_arguments builds no parser")


def _command(name: str, purpose: str) -> str:
    parser = parser_of(name)
    lines = [f"## {name}\n"]
    description = (parser.description or "").strip()
    if "\n\n" in description:  # a summary, then forms of the command
        summary, _, forms = description.partition("\n\n")
        lines += [f"{_paragraph(summary)}\n", f"```text\n{forms}\n```\n"]
    else:
        lines.append(f"{_paragraph(description) or purpose}\n")
    groups = [group for group in parser._action_groups if group._group_actions]
    actions = [action for group in groups for action in group._group_actions if not _is_help(action)]
    actions.sort(key=lambda action: not action.option_strings)  # options first, as everywhere in the documentation
    lines.append(f"```text\n{parser.prog}{''.join(f' {_usage(action)}' for action in actions)}\n```\n")
    rows = [f"| {_term(action)} | {_help(action, parser)} |" for action in actions]
    lines += ["| argument | meaning |", "|---|---|", *rows, ""]
    if parser.epilog:
        lines.append(f"{_paragraph(parser.epilog)}\n")
    return "\n".join(lines)


def _is_help(action: argparse.Action) -> bool:
    return isinstance(action, argparse._HelpAction)


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    value = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    return {"*": f"[{value} ...]", "+": f"{value} [{value} ...]", "?": f"[{value}]"}.get(str(action.nargs), value)


def _usage(action: argparse.Action) -> str:
    text = " ".join(filter(None, [*action.option_strings[-1:], _value(action)]))
    return text if action.required or not action.option_strings else f"[{text}]"


def _term(action: argparse.Action) -> str:
    text = " ".join(filter(None, [", ".join(action.option_strings), _value(action)]))
    return f"`{text}`".replace("|", "\\|")


def _help(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    text = _paragraph((action.help or "") % (vars(action) | {"prog": parser.prog})).replace("|", "\\|")
    if action.choices is not None:
        text += "; one of " + ", ".join(f"`{choice}`" for choice in action.choices)
    return text + ("; required" if action.option_strings and action.required else "")


REFERENCES = {"config.md": config_reference, "commands.md": command_reference}


def main() -> None:
    """Write the references."""
    REFERENCE.mkdir(exist_ok=True)
    for name, generate in REFERENCES.items():
        (REFERENCE / name).write_text(generate(), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Command-line parsers and argument types that the commands share."""

import argparse
import glob
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pipeline.config.hints import suggest_key
from pipeline.config.shipped import shipped_configs
from pipeline.console import DEBUG
from pipeline.errors import UserError, suggest

COUNT = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
BYTES = {
    "B": 1.0,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "TB": 1e12,
    "KiB": 2.0**10,
    "MiB": 2.0**20,
    "GiB": 2.0**30,
    "TiB": 2.0**40,
}
COMPLETION = "_ARGCOMPLETE"  # set by the shell: the number of the word that names the program
SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
NUMBER = r"\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?"


class _Parser(argparse.ArgumentParser):
    """A parser that answers an option of another program with the key of the config, and requests for completion."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Complete the line if the shell asks for it, else parse it."""
        complete(self)
        return super().parse_args(args, namespace)

    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Complete the line if the shell asks for it, else parse it."""
        complete(self)
        return super().parse_intermixed_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, and exit with code 2."""
        prefix, _, rest = message.partition("unrecognized arguments: ")
        words = rest.split()
        if not prefix and words and words[0].startswith("-"):
            name, _, value = words[0].lstrip("-").partition("=")
            if not value and len(words) > 1 and not words[1].startswith("-"):
                value = words[1]
            if hint := suggest_key(name, value or None, {}):
                message += f"; the config has this as a key: {hint}"
        super().error(message)


class _EnableDebug(argparse.Action):
    """Set the environment variable that `pipeline.console` and child processes read."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        os.environ[DEBUG] = "1"


def command_parser(
    command: str,
    description: str,
    *,
    epilog: str | None = None,
    formatter: type[argparse.HelpFormatter] = argparse.HelpFormatter,
) -> argparse.ArgumentParser:
    """Create the parser of a command. It has the option --debug.

    Args:
        command: Name of the command, as in `python -m pipeline COMMAND`.
        description: Text above the options in the help.
        epilog: Text below the options in the help.
        formatter: argparse's class that formats both texts.
    """
    parser = _Parser(prog=program_name(command), description=description, epilog=epilog, formatter_class=formatter)
    parser.add_argument(
        "--debug",
        action=_EnableDebug,
        nargs=0,
        help=f"redirect no output, so that print() and breakpoint() work; the same as {DEBUG}=1",
    )
    return parser


def program_name(command: str) -> str:
    """Return the words that started a command: train.py, efficientnet train, or python -m pipeline train."""
    program = Path(sys.argv[0]).name
    if program == f"{command}.py":
        return program
    return f"{'efficientnet' if program == 'efficientnet' else 'python -m pipeline'} {command}"


def add_config(parser: argparse._ActionsContainer, example: str, *, required: bool = True) -> None:
    """Add --config: a YAML file or the name of a shipped config.

    Args:
        parser: The parser or a group of it.
        example: Name of a shipped config that suits the command.
        required: The option must be given.
    """
    action = parser.add_argument(
        "--config",
        type=config_path,
        required=required,
        help=f"a YAML file, or the name of a shipped config, such as {example}",
    )
    action.completer = complete_config  # type: ignore[attr-defined]  # argcomplete looks for it


def config_path(text: str) -> Path:
    """Return the path of a config: of the file, or of the shipped config with this name."""
    path = local_path(text)
    if path.exists() or path.suffix or os.sep in text:
        return path
    shipped = shipped_configs()
    if text not in shipped:
        raise argparse.ArgumentTypeError(
            f"there is neither a file nor a shipped config {text!r}{suggest(text, shipped)}"
        )
    return shipped[text]


def complete_config(prefix: str, **_: object) -> list[str]:
    """Return the shipped configs and the YAML files that begin with a prefix, for the completion of the shell."""
    folder, start = os.path.split(prefix)
    above = prefix.removesuffix(start)
    files = [
        f"{above}{path.name}{'/' if path.is_dir() else ''}"
        for path in Path(folder or ".").expanduser().glob(f"{glob.escape(start)}*")
        if path.is_dir() or path.suffix in (".yaml", ".yml")
    ]
    return [*(name for name in shipped_configs() if name.startswith(prefix)), *sorted(files)]


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell's request for a completion, if there is one, and exit."""
    if COMPLETION in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)


def add_overrides(parser: argparse.ArgumentParser, example: str, *, metavar: str = "key=value") -> None:
    """Add the positional arguments that change keys of the config."""
    parser.add_argument("overrides", nargs="*", metavar=metavar, help=f"changes to the config, such as {example}")


def quantity(units: Mapping[str, float], example: str) -> Callable[[str], float]:
    """Return an argparse type: a number above 0, directly followed by one of `units`."""

    def parse(text: str) -> float:
        match = re.fullmatch(rf"({NUMBER})\s*([A-Za-z]*)", text.strip())
        if not match or match[2] not in units:
            names = ", ".join(unit or "none" for unit in units)
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a number with a unit; write it like {example} (units: {names})"
            )
        value = float(match[1]) * units[match[2]]
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} must be above 0 and finite")
        return value

    return parse


def value_range(text: str) -> Sequence[float]:
    """Parse `start:stop:step`, both ends included, or a single number; no value may be below 1."""
    parts = text.split(":")
    if len(parts) not in (1, 3) or not all(re.fullmatch(NUMBER, part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor start:stop:step, such as 1.0:1.5:0.1")
    start, stop, step = (float(part) for part in (parts if len(parts) == 3 else (parts[0], parts[0], "1")))
    if not (1 <= start <= stop <= 4 and step >= 0.001):
        raise argparse.ArgumentTypeError(f"{text!r} must rise from at least 1 to at most 4, in steps of at least 0.001")
    return [round(start + i * step, 6) for i in range(math.floor((stop - start) / step + 1e-9) + 1)]


def local_path(text: str) -> Path:
    """Return a path, with ~ as the home folder also where the shell leaves it, as in --out=~/results."""
    return Path(text).expanduser()


def positive_int(text: str) -> int:
    """Parse an integer above 0."""
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer above 0")
    return int(text)


def check_folder(path: Path) -> None:
    """Check that the folder of a file to be written exists, before anything is computed for it.

    Raises:
        UserError: There is no such folder.
    """
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; create it first")

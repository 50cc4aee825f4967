"""Print the JSON schema of the config, for editors."""

import argparse
from collections.abc import Sequence

from pipeline.cli.arguments import check_folder, command_parser, local_path
from pipeline.console import Console
from pipeline.files import atomic_write


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser(
        "schema",
        "Print the JSON schema of a config, by which editors complete and check it.",
        epilog="A config names it in its first line: # yaml-language-server: $schema=config.schema.json",
    )
    parser.add_argument("--out", type=local_path, metavar="FILE", help="write it into this file")
    return parser.parse_args(argv)


def main(console: Console, argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        console: Console for the output.
        argv: Arguments; None takes those of the process.
    """
    arguments = parse_arguments(argv)
    from pipeline.config.json_schema import config_schema

    if arguments.out is None:
        print(config_schema(), end="", file=console.reserve_stdout(), flush=True)
    else:
        check_folder(arguments.out)
        atomic_write(arguments.out, config_schema())
        console.print(f"written to {arguments.out}", wrap=False)
    return 0

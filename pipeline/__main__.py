"""The commands: python -m pipeline COMMAND, or efficientnet COMMAND once the package is installed."""

import argparse
import os
import sys
from importlib import import_module
from importlib.metadata import version

from pipeline import report_missing_package

try:
    from pipeline.cli.arguments import COMPLETION, complete, program_name
    from pipeline.console import Console, run_cli
except ModuleNotFoundError as error:
    report_missing_package(error)

COMMANDS = {
    "train": "train or fine-tune as a config describes",
    "evaluate": "evaluate a run or published weights on labeled images",
    "predict": "label images with a run or published weights",
    "compare": "compare runs on the same images, with significance tests",
    "export": "export a model as SavedModel, LiteRT, int8 LiteRT and ONNX, and verify each file",
    "check": "check a data set: bad files, duplicates, leakage, empty classes",
    "pack": "pack a data set, or TFRecord files, into a few large files with random access",
    "data-server": "decode and augment images on this machine for runs on others",
    "bench": "measure how fast a config trains: step, input pipeline and both; against plain Keras",
    "schema": "print the JSON schema of the config, by which editors complete and check it",
    "scale": "list the variants, search alpha, beta and gamma, or find the largest model within a budget",
}


def main(console: Console) -> int:
    """Run the command that the first argument names and return its exit code."""
    parser = argparse.ArgumentParser(
        prog=program_name("").strip(), epilog="COMMAND --help describes the options of a command."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('efficientnet-pipeline')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, purpose in COMMANDS.items():
        commands.add_parser(name, help=purpose)
    complete_command()
    complete(parser)
    command = parser.parse_args(sys.argv[1:2]).command
    return import_module(f"pipeline.cli.{command.replace('-', '_')}").main(console, sys.argv[2:])


def complete_command() -> None:
    """Answer the shell's request for a completion if the line names a command already, and exit."""
    line = os.environ.get("COMP_LINE", "") if COMPLETION in os.environ else ""
    words = line.split()
    if words[1:2] and words[1] in COMMANDS and (len(words) > 2 or line.endswith(" ")):
        # The parser of the command takes the command's name for that of the program.
        os.environ[COMPLETION] = str(int(os.environ[COMPLETION]) + 1)
        import_module(f"pipeline.cli.{words[1].replace('-', '_')}").parse_arguments([])


def run() -> int:
    """Run the command line and return the exit code; the entry point of the console script."""
    return run_cli(main)


if __name__ == "__main__":
    sys.exit(run())

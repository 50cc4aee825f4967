"""The smaller programs: python -m pipeline PROGRAM. Each is a module of pipeline/commands with a `main` of its own."""

import argparse
import sys
from importlib import import_module

from pipeline.console import Console, run_cli

PROGRAMS = {
    "bench": "how fast a config trains: step, stream and both; against plain Keras",
    "check": "what is wrong with a data set: bad files, duplicates, leakage, empty classes",
    "compare": "whether a run is better than another on the same images, and how sure that is",
    "export": "a run's network as SavedModel, LiteRT, int8 LiteRT and ONNX, each proven equal to it",
    "pack": "a data set as a few large files that are read in any order; TFRecord files, too",
    "scale": "the family's sizes; a grid search for alpha, beta, gamma; the largest network within a budget",
    "data-server": "pictures decoded and augmented here for a run on another machine",
}


def main(screen: Console) -> int:
    """Runs the program that is named first on the command line; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipeline")
    programs = parser.add_subparsers(dest="program", required=True, metavar="PROGRAM")
    for name, purpose in PROGRAMS.items():
        programs.add_parser(name, help=purpose)
    program = parser.parse_args(sys.argv[1:2]).program
    return import_module(f"pipeline.cli.{program.replace('-', '_')}").main(sys.argv[2:], screen)


if __name__ == "__main__":
    sys.exit(run_cli(main))

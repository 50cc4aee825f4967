"""Evaluate a run or published weights, or label images: python evaluate.py --run latest."""

import sys

from pipeline.cli.evaluate import main
from pipeline.console import run_cli

if __name__ == "__main__":
    sys.exit(run_cli(main))

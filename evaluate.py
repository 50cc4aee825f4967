"""Evaluate a run or published weights, or label images: python evaluate.py --run latest."""

import sys

from pipeline import report_missing_package

try:
    from pipeline.cli.evaluate import main
    from pipeline.console import run_cli
except ModuleNotFoundError as error:
    report_missing_package(error)

if __name__ == "__main__":
    sys.exit(run_cli(main))

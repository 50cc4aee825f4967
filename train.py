"""Train or fine-tune an EfficientNet: python train.py --config configs/b2_flowers.yaml [key=value ...]."""

import sys

from pipeline import report_missing_package

try:
    from pipeline.cli.train import main
    from pipeline.console import run_cli
except ModuleNotFoundError as error:
    report_missing_package(error)

if __name__ == "__main__":
    sys.exit(run_cli(main))

"""Train or fine-tune an EfficientNet: python train.py --config configs/b2_flowers.yaml [key=value ...]."""

import sys

from pipeline.cli.train import main
from pipeline.console import run_cli

if __name__ == "__main__":
    sys.exit(run_cli(main))

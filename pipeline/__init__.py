"""EfficientNet training and fine-tuning: YAML in, a trained, tracked and honestly evaluated model out."""

import os
import sys
from typing import NoReturn

ORIGINAL_ENVIRONMENT = dict(os.environ)  # for processes that must not see the change below, such as the Keras baseline

# TensorFlow reads this variable when it is imported. By default it uses oneDNN's kernels on some processors only. On
# processors without AVX-512, B0 with fused batch normalization trains 1.3 times as fast with them (two cores of an AMD
# EPYC, 224 pixels, 16 images). The kernels round differently, so every process that computes with this package has to
# agree: commands, notebooks, tests, spawned processes and programs that import one module. They have only the import of
# `pipeline` in common, which always precedes its modules' import of TensorFlow; a call in `run_cli` would miss the
# rest.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")


def report_missing_package(error: ModuleNotFoundError) -> NoReturn:
    """Say how to get an environment with the package that an import did not find, and end with exit code 2."""
    print(
        f"error: {sys.executable} has no package {error.name}; run `make setup` in the project's folder, then "
        ".venv/bin/python in place of python",
        file=sys.stderr,
    )
    sys.exit(2)

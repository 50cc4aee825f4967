"""What every test needs: quiet libraries, and nothing written into the project's folder or the user's cache."""

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cache-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

from launching import LauncherProcess  # noqa: E402

import pipeline  # noqa: E402, F401 - settles what TensorFlow reads when it is imported, and keeps the environment made above


def pytest_collection_finish() -> None:
    """Keep the garbage collector from going through all objects of the libraries again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def launcher_process() -> Iterator[LauncherProcess]:
    """What runs a command of the program in a process that needs not load the libraries."""
    process = LauncherProcess()
    yield process
    process.close()


@pytest.fixture(scope="session")
def light_launcher() -> Iterator[LauncherProcess]:
    """The same for what is to happen before any library is loaded."""
    process = LauncherProcess(light=True)
    yield process
    process.close()

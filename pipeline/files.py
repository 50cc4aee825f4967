"""What is to outlast a power cut."""

import os
from pathlib import Path


def fsync(path: Path) -> None:
    """Brings a file's contents, or a folder's names, to the disk.

    Raises:
        OSError: The disk does not take them.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

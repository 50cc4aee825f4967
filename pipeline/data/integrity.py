"""Images that are no longer those of a manifest: gone, replaced or damaged since the scan."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import tensorflow as tf

from pipeline.console import plural
from pipeline.data.inspection import read_header
from pipeline.data.manifest import Manifest
from pipeline.data.sources.base import DataSource, format_list
from pipeline.errors import DataError
from pipeline.files import sha256_of

REMEDY = "Restore them; if the data have been moved, say where they are by data.path=PATH."


def find_changed_images(manifest: Manifest, source: DataSource, indices: np.ndarray) -> list[str]:
    """Compare image files with the hashes of the manifest.

    Args:
        manifest: Images as they were when they were scanned.
        source: Source of the image files.
        indices: Images to compare, int64 (N,).

    Returns:
        For each image that differs its key and a clause that says how.
    """
    rows = manifest.table.iloc[indices]
    with ThreadPoolExecutor() as pool:
        clauses = pool.map(lambda key, sha256: _change(source, key, sha256), rows["key"], rows["sha256"])
        return [f"{key} {clause}" for key, clause in zip(rows["key"], clauses, strict=True) if clause]


def check_images(manifest: Manifest, source: DataSource, split: str) -> None:
    """Check that every image of a split is the one that the manifest describes.

    Raises:
        DataError: Images are gone or have other contents; the message names them.
    """
    indices = manifest.indices(split)
    if changed := find_changed_images(manifest, source, indices):
        raise DataError(
            f"{len(changed):,} of the {plural(len(indices), 'image')} of the split {split} are not those that the run "
            f"was trained with:\n{format_list(changed)}\n{REMEDY}"
        )


@contextmanager
def name_changed_images(manifest: Manifest, source: DataSource) -> Iterator[None]:
    """Turn an error of TensorFlow within the block into one that names the images that have changed, if any have.

    Raises:
        DataError: Images of the manifest are gone or damaged.
    """
    try:
        yield
    except tf.errors.OpError:
        changed = find_changed_images(manifest, source, np.arange(len(manifest.table)))
        if not changed:
            raise
        count = plural(len(changed), "image changed while it was", "images changed while they were")
        raise DataError(
            f"{count} in use:\n{format_list(changed)}\n"
            f"{REMEDY} Training continues from its last checkpoint with --resume."
        ) from None


def _change(source: DataSource, key: str, sha256: str) -> str:
    """Return how an image differs from its hash; empty if it does not."""
    try:
        content = source.read(key)
    except (OSError, LookupError, DataError):
        return "is gone or cannot be read"
    if sha256_of(content) == sha256:
        return ""
    header = read_header(content)
    return header if isinstance(header, str) else "has other contents"

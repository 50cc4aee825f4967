"""The image sources that a config can name: one line each."""

from collections.abc import Callable
from pathlib import Path

from pipeline.config.data import DataConfig
from pipeline.data.sources.base import DataSource
from pipeline.data.sources.csv_file import open_csv
from pipeline.data.sources.digits import DigitsSource
from pipeline.data.sources.folder import open_folder
from pipeline.data.sources.pack import open_pack
from pipeline.data.sources.tfds import open_tfds

SOURCES: dict[
    str, Callable[[DataConfig, bool], DataSource]
] = {  # by data.source: opens it; the second argument allows a download
    "folder": lambda config, download: open_folder(_path(config)),
    "csv": lambda config, download: open_csv(_path(config)),
    "pack": lambda config, download: open_pack(_path(config)),
    "tfds": lambda config, download: open_tfds(config.name or "", config.path or Path("data/tfds"), fetch=download),
    "digits": lambda config, download: DigitsSource(),
}


def open_source(config: DataConfig, *, fetch: bool = True) -> DataSource:
    """Open the data set that the config names.

    Args:
        config: Names it.
        fetch: Whether to download and prepare it where it comes from tensorflow-datasets and is not there yet.

    Returns:
        The source.

    Raises:
        NotFetchedError: It is not there yet and `fetch` is False.
        DataError: The data cannot be had, or their layout is not understood. The message says what to do.
    """
    return SOURCES[config.source](config, fetch)


def _path(config: DataConfig) -> Path:
    assert config.path is not None  # the schema sees to it
    return config.path

"""The image sources that a config can name: one line each."""

from collections.abc import Callable
from pathlib import Path

from pipeline.config.data import DataConfig
from pipeline.data.sources.base import DataSource
from pipeline.data.sources.csv_file import open_csv
from pipeline.data.sources.digits import DigitsSource
from pipeline.data.sources.folder import open_folder
from pipeline.data.sources.huggingface import open_huggingface
from pipeline.data.sources.pack import open_pack
from pipeline.data.sources.tfds import open_tfds

# By data.source: opens it; the second argument allows a download.
SOURCES: dict[str, Callable[[DataConfig, bool], DataSource]] = {
    "folder": lambda config, download: open_folder(_path(config)),
    "csv": lambda config, download: open_csv(_path(config), config.columns, config.root),
    "pack": lambda config, download: open_pack(_path(config)),
    "tfds": lambda config, download: open_tfds(config.name or "", config.path or Path("data/tfds"), download=download),
    "huggingface": lambda config, download: open_huggingface(config, download=download),
    "digits": lambda config, download: DigitsSource(),
}


def open_source(config: DataConfig, *, download: bool = True) -> DataSource:
    """Open the data set that the config names.

    Args:
        config: Section `data` of the config.
        download: Whether to download and prepare a data set that is not on this machine yet.

    Returns:
        The source.

    Raises:
        DatasetNotDownloadedError: The data are not on this machine yet and `download` is False.
        DataError: The data are not available, or their layout is unknown. The message says what to do.
    """
    return SOURCES[config.source](config, download)


def _path(config: DataConfig) -> Path:
    assert config.path is not None  # the schema sees to it
    return config.path

"""Files at addresses, such as s3://BUCKET/KEY or https://HOST/FILE, by the library fsspec.

Packing reads them; training reads files of this machine only, whose speed and contents do not depend on a network.
"""

import errno
import posixpath
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from pipeline.config.base import is_address
from pipeline.console import install_command, python_executable
from pipeline.data.sources.servers import short_message
from pipeline.errors import DataError

ATTEMPTS, PAUSE_SECONDS = 3, 1.0  # of a transfer; the pause doubles
CONNECT_SECONDS, SILENCE_SECONDS = 30, 60  # of a web server; the library's own limit is five minutes for a whole file
VERSIONS = ("ETag", "etag", "md5Hash", "Content-MD5", "Last-Modified", "LastModified", "updated", "mtime", "created")
T = TypeVar("T")


def file_name(address: str) -> str:
    """Return the name of the file at an address or path, without folders and query."""
    path = urlsplit(address).path if address.startswith("http") and is_address(address) else address
    return path.rstrip("/").rpartition("/")[2]


def parent(address: str) -> str:
    """Return the folder that a file lies in, both as addresses."""
    return address.partition("?")[0].rpartition("/")[0]


def join(folder: str, path: str) -> str:
    """Return the address of a file by its path, relative to the address of a folder."""
    protocol, _, rest = folder.partition("://")
    if protocol in ("http", "https"):
        path = quote(path)  # a file's name may have a question mark in it
    return f"{protocol}://{posixpath.normpath(posixpath.join(rest, path))}"


def glob(pattern: str) -> list[str]:
    """Return the addresses that match a pattern with *, sorted.

    Raises:
        DataError: The server cannot be reached, or a package is missing.
    """
    files, path = _open_filesystem(pattern)
    return _attempt(pattern, lambda: sorted(files.unstrip_protocol(name) for name in files.glob(path)))


def state(address: str) -> str:
    """Return a text that changes with the file at an address: its size, and the version that the server gives.

    Raises:
        DataError: There is no such file, or it cannot be reached.
    """
    files, path = _open_filesystem(address)
    info = _attempt(address, lambda: files.info(path))
    version = next((f", {name} {info[name]}" for name in VERSIONS if info.get(name)), "")
    return f"{info.get('size')} bytes{version}"


def read(address: str) -> bytes:
    """Return the contents of the file at an address.

    Raises:
        DataError: There is no such file, or it cannot be read.
    """
    files, path = _open_filesystem(address)
    return _attempt(address, lambda: files.cat_file(path))


def download(address: str, target: Path) -> None:
    """Copy the file at an address to a path on this machine.

    Raises:
        DataError: There is no such file, or it cannot be read.
        OSError: The disk does not accept the copy.
    """
    files, path = _open_filesystem(address)
    _attempt(address, lambda: files.get_file(path, str(target)))


def _open_filesystem(address: str) -> tuple[Any, str]:
    """Return fsspec's file system for an address, and the path in it."""
    protocol = address.partition("://")[0]
    try:
        import fsspec

        options = {}
        if protocol in ("http", "https"):
            from aiohttp import ClientTimeout

            limits = ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS)
            options = {"client_kwargs": {"timeout": limits}}
        return fsspec.core.url_to_fs(address, **options)
    except ImportError as error:
        # Of the protocols that are no extra here, such as s3, the library names the package.
        is_extra = error.name in ("fsspec", "aiohttp")
        command = install_command("remote") if is_extra else f"{python_executable()} -m pip install ..."
        raise DataError(f"{address}: a package is missing: {short_message(error)}: {command}") from None
    except ValueError as error:
        raise DataError(f"{address} is no address that fsspec knows: {short_message(error)}") from None


def _attempt(address: str, transfer: Callable[[], T]) -> T:
    """Return what a transfer returns; try it again if it fails for a reason that may pass."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return transfer()
        except FileNotFoundError:
            raise DataError(f"{address}: there is no such file") from None
        except Exception as error:  # whatever the libraries of the protocols raise
            refused = isinstance(error, PermissionError) or 400 <= getattr(error, "status", 0) < 500
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise  # of this machine's disk
            if refused or attempt == ATTEMPTS:
                raise DataError(f"{address} cannot be read: {short_message(error)}") from None
            time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
    raise AssertionError("unreachable")

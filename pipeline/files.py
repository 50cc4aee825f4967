"""Files that survive a crash: atomic writes, locks between processes, SHA-256 digests and the cache folder."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def atomic_path(path: Path, *, unique: bool = False) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` once the block has succeeded.

    A reader sees the old file or the new one, never a part. The temporary file lies in the same folder, has the same
    suffix, is synced to the disk before the rename, and is removed if the block raises.

    Args:
        path: The file to write.
        unique: Use a temporary name that no other process uses, for files that several processes may write at once.
            Otherwise the name is `temporary_name(path.name)`, so that what a kill leaves is overwritten next time.

    Raises:
        OSError: The disk does not accept the file.
    """
    temporary = path.with_name(temporary_name(f"{os.urandom(4).hex()}-{path.name}" if unique else path.name))
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a file completely or not at all.

    Args:
        path: The file, in an existing folder.
        content: Its new content; text is encoded as UTF-8.

    Raises:
        OSError: The disk does not accept the file.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def temporary_name(name: str) -> str:
    """Return the name under which `atomic_path` writes a file called `name`."""
    return f".new-{name}"


def fsync(path: Path) -> None:
    """Flush the content of a file, or the names in a folder, to the disk.

    Raises:
        OSError: The disk does not accept them.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def exclusive_lock(path: Path, busy: Exception | None = None) -> Iterator[None]:
    """Hold a lock for the length of the block. The system releases it however the process ends.

    Args:
        path: The lock file, in an existing folder; created if missing.
        busy: Raised at once if another process holds the lock; None waits for it.

    Raises:
        OSError: The folder does not accept a lock file.
    """
    lock = FileLock(path, timeout=-1 if busy is None else 0)
    try:
        lock.acquire()
    except Timeout:
        assert busy is not None
        raise busy from None
    try:
        yield
    finally:
        lock.release()


def sha256_of(content: bytes | Path) -> str:
    """Return the SHA-256 of bytes, or of the file at a path, as hexadecimal text."""
    if isinstance(content, Path):
        with content.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(content).hexdigest()


def cache_folder() -> Path:
    """Return the folder for data that later runs can reuse: efficientnet-pipeline/ under XDG_CACHE_HOME or ~/.cache.

    Raises:
        RuntimeError: XDG_CACHE_HOME is not set and the user has no home folder.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "efficientnet-pipeline"

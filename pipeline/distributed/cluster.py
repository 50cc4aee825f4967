"""The cluster of a run, read from TensorFlow's environment variable TF_CONFIG on every machine."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.config.address import parse_address
from pipeline.distributed.signals import signal_handler
from pipeline.errors import ConfigError, RunError

EXAMPLE_TF_CONFIG = '{"cluster": {"worker": ["host0:2222", "host1:2222"]}, "task": {"type": "worker", "index": 0}}'


@dataclass(frozen=True)
class ProcessInfo:
    """The position of this process among the processes of a run.

    Attributes:
        addresses: host:port of every process, the chief first.
        rank: Index of this process among them.
        has_chief: True if TF_CONFIG names a chief; otherwise the chief is worker 0.
    """

    addresses: tuple[str, ...]
    rank: int
    has_chief: bool = False

    @property
    def is_chief(self) -> bool:
        """True in the process that writes the run."""
        return self.rank == 0

    def name(self, rank: int | None = None) -> str:
        """Return the name of a process for the console; None stands for this process."""
        rank = self.rank if rank is None else rank
        return f"process {rank + 1} of {len(self.addresses)} ({self.addresses[rank]})"

    def others(self) -> str:
        """Return the addresses of the other processes, at most eight of them."""
        others = [address for rank, address in enumerate(self.addresses) if rank != self.rank]
        return ", ".join(others[:8]) + (f" and {len(others) - 8} more" if len(others) > 8 else "")

    def rank_of(self, job: str, task: int) -> int:
        """Return the rank of the process that TensorFlow names by a job and a task."""
        return task + (self.has_chief and job == "worker")

    @contextmanager
    def connecting(self) -> Iterator[None]:
        """Let SIGTERM and Ctrl-C end the process at once inside the block, where TensorFlow connects the processes.

        Python's own handlers do not run while TensorFlow waits.
        """
        with signal_handler(signal.SIG_DFL):
            yield

    def wait_for_chief(self, report: Callable[[str], None], timeout: float = 600.0) -> None:
        """Wait until the chief listens at its address.

        Args:
            report: Called once with a line for the user if the process has to wait.
            timeout: Seconds to wait at most.

        Raises:
            RunError: The chief does not listen in time.
        """
        start, reported = time.monotonic(), False
        while time.monotonic() - start < timeout:
            try:
                socket.create_connection(parse_address(self.addresses[0]), timeout=5).close()
                return
            except OSError:
                if not reported:
                    report(f"{self.name()} waits for the chief at {self.addresses[0]}")
                reported = True
                time.sleep(0.5)
        raise RunError(
            f"{self.name(0)} cannot be reached after {timeout:.0f} s; it was never started, "
            "has ended (see its output), or is behind a firewall"
        )


def cluster_from_tf_config(strategy: str) -> ProcessInfo | None:
    """Return the position of this process in the cluster of TF_CONFIG.

    Args:
        strategy: As `runtime.strategy`; single and mirrored ignore TF_CONFIG.

    Returns:
        The position, or None for a run of a single process.

    Raises:
        ConfigError: TF_CONFIG is missing where it is needed, or is malformed.
    """
    text = os.environ.get("TF_CONFIG", "")
    if strategy not in ("auto", "multi_worker") or (strategy == "auto" and not text):
        return None
    if not text:
        raise ConfigError(
            f"runtime.strategy: multi_worker needs the variable TF_CONFIG on each machine, such as {EXAMPLE_TF_CONFIG}"
        )
    try:
        value = json.loads(text)
        chiefs, workers = (_addresses(value, job) for job in ("chief", "worker"))
        task = value["task"]["type"], int(value["task"]["index"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"TF_CONFIG: is not such as {EXAMPLE_TF_CONFIG}. Received: {text}") from None
    tasks = [("chief", index) for index in range(len(chiefs))] + [("worker", index) for index in range(len(workers))]
    if len(chiefs) > 1:
        raise ConfigError(f"TF_CONFIG: there can be one chief at most. Received: {text}")
    if len({*chiefs, *workers}) < len(tasks):
        raise ConfigError(f"TF_CONFIG: two processes have the same address. Received: {text}")
    if task not in tasks:
        raise ConfigError(
            f"TF_CONFIG: its task, {task[0]} {task[1]}, is not among its chief and workers. Received: {text}"
        )
    return ProcessInfo((*chiefs, *workers), tasks.index(task), bool(chiefs)) if len(tasks) > 1 else None


def _addresses(value: Any, job: str) -> list[str]:
    addresses = value["cluster"].get(job, [])
    if not isinstance(addresses, list):
        raise ValueError
    for address in addresses:
        parse_address(address)
    return addresses

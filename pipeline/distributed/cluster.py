"""Which of a run's processes this one is.

TensorFlow's own variable TF_CONFIG says so on every machine that takes part.
"""

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
from pipeline.errors import ConfigError, RunError

EXAMPLE_TF_CONFIG = '{"cluster": {"worker": ["host0:2222", "host1:2222"]}, "task": {"type": "worker", "index": 0}}'


@dataclass(frozen=True)
class ProcessInfo:
    """The place of this process among those of a run.

    Attributes:
        addresses: host:port of every process, the chief's first.
        number: Of this process among them.
        has_chief: Whether the first one goes by that name in TF_CONFIG; else it is worker 0.
    """

    addresses: tuple[str, ...]
    rank: int
    has_chief: bool = False

    @property
    def is_chief(self) -> bool:
        """Whether this is the process that writes what there is to write."""
        return self.rank == 0

    def name(self, rank: int | None = None) -> str:
        """What a process is called on the screen; this one for None."""
        rank = self.rank if rank is None else rank
        return f"process {rank + 1} of {len(self.addresses)} ({self.addresses[rank]})"

    def others(self) -> str:
        """The addresses of the other processes, the first few."""
        others = [address for number, address in enumerate(self.addresses) if number != self.rank]
        return ", ".join(others[:8]) + (f" and {len(others) - 8} more" if len(others) > 8 else "")

    def rank_of(self, job: str, task: int) -> int:
        """The number of the process that TensorFlow calls so."""
        return task + (self.has_chief and job == "worker")

    @contextmanager
    def connecting(self) -> Iterator[None]:
        """A block in which TensorFlow connects the processes.

        SIGTERM and Ctrl-C end the process at once: it would not hear of them.
        """
        before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def wait_for_chief(self, report: Callable[[str], None], timeout: float = 600.0) -> None:
        """Wait until the first process listens at its address.

        Args:
            say: Told that there is something to wait for, where there is.
            timeout: Seconds.

        Raises:
            RunError: It does not come.
        """
        start, told = time.monotonic(), False
        while time.monotonic() - start < timeout:
            try:
                socket.create_connection(parse_address(self.addresses[0]), timeout=5).close()
                return
            except OSError:
                if not told:
                    report(f"{self.name()} waits for the first one at {self.addresses[0]}")
                told = True
                time.sleep(0.5)
        raise RunError(
            f"{self.name(0)} cannot be reached after {timeout:.0f} s; it was never started, has ended (see what it said), or is shut off"
        )


def cluster_from_tf_config(strategy: str) -> ProcessInfo | None:
    """Read TF_CONFIG.

    Args:
        strategy: As `runtime.strategy`; one and mirrored are for a single process whatever TF_CONFIG says.

    Returns:
        None for a run of this process alone.

    Raises:
        ConfigError: TF_CONFIG is missing where it is needed, or is not what TensorFlow wants.
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

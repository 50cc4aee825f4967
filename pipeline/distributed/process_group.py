"""The processes of a run on several machines: broadcasts from the chief, barriers and common decisions.

All of them are collective operations of TensorFlow's strategy, so every process has to make every call, in the same
order. A process that ends in between ends all of them: TensorFlow notices a broken connection at once, and a machine
that no longer answers within seconds.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import tensorflow as tf

from pipeline import errors
from pipeline.distributed.cluster import ProcessInfo
from pipeline.distributed.sharding import local_replicas
from pipeline.errors import RunError, TrainingError, UserError

logger = logging.getLogger(__name__)

# TensorFlow's messages if another process is gone; no error of this process contains them.
PEER_FAILURE = re.compile(
    "ollective ops is aborted|oordination (service|agent)|unhealthy|failed to connect|Socket closed|"
    "Connection (reset|refused)|incarnation"
)


class ProcessGroup:
    """The processes that take part in a run; for a single process every method is trivial.

    Attributes:
        process_info: Position of this process; None for a run of a single process.
        world_size: Number of processes.
        rank: Index of this process, from 0.
        is_chief: True in the process that writes checkpoints, MLflow and reports.
    """

    def __init__(self, process_info: ProcessInfo | None = None, strategy: tf.distribute.Strategy | None = None) -> None:
        """Create the group of the processes that a strategy connects.

        Args:
            process_info: Position of this process; None for a run of a single process.
            strategy: The strategy that connects the processes; None for a run of a single process.
        """
        self.process_info, self._strategy = process_info, strategy
        self.world_size, self.rank = (
            (1, 0) if process_info is None else (len(process_info.addresses), process_info.rank)
        )
        self.is_chief = self.rank == 0
        self._all_reduce = tf.function(self._summed, autograph=False)

    def broadcast_from_chief(self, make: Callable[[], Mapping[str, bytes]]) -> dict[str, bytes]:
        """Call `make` on the chief only, and return its result on every process; its error is raised on every process.

        Raises:
            UserError: The chief raised it.
            TrainingError: The chief raised it.
        """
        if self.world_size == 1:
            return dict(make())
        head, body = b"", b""
        if self.is_chief:
            try:
                parts = make()
                head, body = (
                    json.dumps({"sizes": {name: len(part) for name, part in parts.items()}}).encode(),
                    b"".join(parts.values()),
                )
            except (UserError, TrainingError) as error:
                head = json.dumps({"error": type(error).__name__, "message": str(error)}).encode()
        header = json.loads(self._broadcast(head))
        if "error" in header:
            raise getattr(errors, header["error"], RunError)(header["message"])
        body, parts, start = self._broadcast(body), {}, 0
        for name, size in header["sizes"].items():
            parts[name] = body[start : start + size]
            start += size
        return parts

    def any_process(self, flag: bool) -> bool:
        """Return True if the flag is set on at least one process."""
        return flag if self.world_size == 1 else bool(self._sum(np.array([flag], np.int64))[0])

    def barrier(self) -> None:
        """Wait until every process has made this call."""
        self.any_process(False)

    def final_barrier(self) -> None:
        """Wait for the chief at the end of a run; the chief ignores that another process has ended already."""
        try:
            self.barrier()
        except tf.errors.OpError as error:
            if not self.is_chief:
                raise
            logger.warning("another process was gone at the end: %s", error.message)

    def assert_same_on_all(self, describe: Callable[[], Mapping[str, str]]) -> None:
        """Check that all processes run the same thing.

        Args:
            describe: Returns facts by name, with the same names on every process. It is not called for a run of a
                single process.

        Raises:
            RunError: The facts of a process differ from the chief's.
        """
        if self.world_size == 1:
            return
        facts = describe()
        chiefs = json.loads(self.broadcast_from_chief(lambda: {"facts": json.dumps(facts).encode()})["facts"])
        differs = np.zeros((self.world_size, len(facts)), np.int64)
        differs[self.rank] = [facts[name] != chiefs[name] for name in facts]
        differs = self._sum(differs.ravel()).reshape(differs.shape)
        if differs.any():
            assert self.process_info is not None
            lines = [
                f"  {self.process_info.name(rank)}: "
                + ", ".join(name for name, differing in zip(facts, row, strict=True) if differing)
                for rank, row in enumerate(differs)
                if row.any()
            ]
            raise RunError(
                "the processes of the run differ from the chief in\n"
                + "\n".join(lines)
                + "\nstart all of them with the same program, config, data and weights"
            )

    @contextmanager
    def translate_peer_failure(self) -> Iterator[None]:
        """Translate TensorFlow's error that another process is gone into one for the user.

        Raises:
            TrainingError: Another process has ended or cannot be reached.
        """
        try:
            yield
        except tf.errors.OpError as error:
            if self.process_info is None or not PEER_FAILURE.search(error.message):
                raise
            logger.error("%s: %s", type(error).__name__, error.message)
            named = re.findall(r"/job:(chief|worker)/(?:replica:\d+/)?task:(\d+)", error.message)
            raise TrainingError(
                f"another process of the run has ended{self._ended_names(named)}; its output tells why. Start all "
                "of them again with --resume to continue after the last checkpoint"
            ) from error

    def _ended_names(self, named: list[tuple[str, str]]) -> str:
        """Return a phrase with the processes that TensorFlow's error names, except for this one."""
        assert self.process_info is not None
        ranks = {self.process_info.rank_of(job, int(task)) for job, task in named} - {self.rank}
        if not ranks:
            return ""
        names = ", ".join(self.process_info.name(rank) for rank in sorted(ranks) if rank < self.world_size)
        return f" or cannot be reached: {names}"

    def _broadcast(self, content: bytes) -> bytes:
        """Return the chief's bytes; the content of the other processes is ignored."""
        size = int(self._sum(np.array([len(content) if self.is_chief else 0], np.int64))[0])
        padded = content.ljust(-(-size // 8) * 8, b"\0") if self.is_chief else bytes(-(-size // 8) * 8)
        return self._sum(np.frombuffer(padded, np.int64)).tobytes()[:size] if size else b""

    def _sum(self, values: np.ndarray) -> np.ndarray:
        """Return int64 (N,), summed over the processes."""
        strategy = self._strategy
        assert strategy is not None
        replicas = local_replicas(strategy)  # the first one contributes the values of this process

        def of_replica(context: tf.distribute.experimental.ValueContext) -> tf.Tensor:
            return tf.constant(values if context.replica_id_in_sync_group % replicas == 0 else np.zeros_like(values))

        shares = strategy.experimental_distribute_values_from_function(of_replica)
        return strategy.experimental_local_results(self._all_reduce(shares))[0].numpy()

    def _summed(self, shares: tf.Tensor) -> tf.Tensor:
        def in_replica(share: tf.Tensor) -> tf.Tensor:
            share = tf.identity(share)  # moves it to the replica's device, where an argument is not
            return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, share)

        assert self._strategy is not None
        return self._strategy.run(in_replica, args=(shares,))

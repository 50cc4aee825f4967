"""The processes of a run on several machines: what one knows the others are told, and what they decide they decide together.

All of it goes through the collective operations of TensorFlow's strategy, so every process has to come by every call,
in the same order. A process that ends in between ends them all: TensorFlow notices at once where the connection breaks,
and within seconds where a machine falls silent.
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
from pipeline.errors import RunError, TrainingError, UserError

logger = logging.getLogger(__name__)

PEER_FAILURE = re.compile(  # what TensorFlow says where a process is gone, and in no error of this one's own
    "ollective ops is aborted|oordination (service|agent)|unhealthy|failed to connect|Socket closed|Connection (reset|refused)|incarnation"
)


class ProcessGroup:
    """The processes that take part in a run; of one alone every method is trivial.

    Attributes:
        place: Of this process; None where it is alone.
        size: Number of processes.
        number: Of this one, from 0.
        is_chief: Whether this is the one that writes checkpoints, MLflow and reports.
    """

    def __init__(self, process_info: ProcessInfo | None = None, strategy: tf.distribute.Strategy | None = None) -> None:
        """Take the strategy that connects the processes, and this one's place."""
        self.process_info, self._strategy = process_info, strategy
        self.world_size, self.rank = (
            (1, 0) if process_info is None else (len(process_info.addresses), process_info.rank)
        )
        self.is_chief = self.rank == 0
        self._all_reduce = tf.function(self._summed, autograph=False)

    def broadcast_from_chief(self, make: Callable[[], Mapping[str, bytes]]) -> dict[str, bytes]:
        """What `make` returns on the chief, where alone it is called, on every process; the chief's error likewise.

        Raises:
            UserError: Of the chief, or
            TrainingError: of the chief.
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
        said = json.loads(self._broadcast(head))
        if "error" in said:
            raise getattr(errors, said["error"], RunError)(said["message"])
        body, parts, start = self._broadcast(body), {}, 0
        for name, size in said["sizes"].items():
            parts[name] = body[start : start + size]
            start += size
        return parts

    def any_process(self, flag: bool) -> bool:
        """Whether the flag is set on one of the processes."""
        return flag if self.world_size == 1 else bool(self._sum(np.array([flag], np.int64))[0])

    def barrier(self) -> None:
        """Comes back when every process has come here."""
        self.any_process(False)

    def final_barrier(self) -> None:
        """The end of a run: the others wait for the chief, which does not mind where one of them is gone already."""
        try:
            self.barrier()
        except tf.errors.OpError as error:
            if not self.is_chief:
                raise
            logger.warning("another process was gone at the end: %s", error.message)

    def assert_same_on_all(self, describe: Callable[[], Mapping[str, str]]) -> None:
        """Make sure that the processes are at work on the same thing.

        Args:
            describe: Gives facts by name, the same names on every process; of the same run they are equal. Not called
                where there is one.

        Raises:
            RunError: A process has others than the chief.
        """
        if self.world_size == 1:
            return
        facts = describe()
        chiefs = json.loads(self.broadcast_from_chief(lambda: {"facts": json.dumps(facts).encode()})["facts"])
        differs = np.zeros((self.world_size, len(facts)), np.int64)
        differs[self.rank] = [facts[name] != chiefs[name] for name in facts]
        found = self._sum(differs.ravel()).reshape(differs.shape)
        if found.any():
            assert self.process_info is not None
            lines = [
                f"  {self.process_info.name(number)}: {', '.join(name for name, one in zip(facts, row, strict=True) if one)}"
                for number, row in enumerate(found)
                if row.any()
            ]
            raise RunError(
                "the processes of the run differ from the first in\n"
                + "\n".join(lines)
                + "\nstart all of them with the same program, "
                "config, data and weights"
            )

    @contextmanager
    def translate_peer_failure(self) -> Iterator[None]:
        """Turns TensorFlow's word that another process is gone into one for the user.

        Raises:
            TrainingError: In its place.
        """
        try:
            yield
        except tf.errors.OpError as error:
            if self.process_info is None or not PEER_FAILURE.search(error.message):
                raise
            logger.error("%s: %s", type(error).__name__, error.message)
            named = re.findall(r"/job:(chief|worker)/(?:replica:\d+/)?task:(\d+)", error.message)
            raise TrainingError(
                f"another process of the run has ended{self._who(named)}; what it said tells why. Start all of them again with --resume to "
                "go on behind the last checkpoint"
            ) from error

    def _who(self, named: list[tuple[str, str]]) -> str:
        """The processes that TensorFlow's error names, but this one, in words."""
        assert self.process_info is not None
        numbers = {self.process_info.rank_of(job, int(task)) for job, task in named} - {self.rank}
        return (
            f" or cannot be reached: {', '.join(self.process_info.name(number) for number in sorted(numbers) if number < self.world_size)}"
            * bool(numbers)
        )

    def _broadcast(self, content: bytes) -> bytes:
        """The chief's bytes, whatever they are elsewhere."""
        size = int(self._sum(np.array([len(content) if self.is_chief else 0], np.int64))[0])
        padded = content.ljust(-(-size // 8) * 8, b"\0") if self.is_chief else bytes(-(-size // 8) * 8)
        return self._sum(np.frombuffer(padded, np.int64)).tobytes()[:size] if size else b""

    def _sum(self, values: np.ndarray) -> np.ndarray:
        """int64 (N,), summed over the processes."""
        strategy = self._strategy
        assert strategy is not None
        replicas = len(strategy.extended.worker_devices)  # of this process; one of them speaks for it

        def of_replica(context: tf.distribute.experimental.ValueContext) -> tf.Tensor:
            return tf.constant(values if context.replica_id_in_sync_group % replicas == 0 else np.zeros_like(values))

        shares = strategy.experimental_distribute_values_from_function(of_replica)
        return strategy.experimental_local_results(self._all_reduce(shares))[0].numpy()

    def _summed(self, shares: tf.Tensor) -> tf.Tensor:
        def in_replica(share: tf.Tensor) -> tf.Tensor:
            share = tf.identity(share)  # on the replica's device, which an argument is not
            return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, share)

        assert self._strategy is not None
        return self._strategy.run(in_replica, args=(shares,))

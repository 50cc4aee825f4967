"""Batches that other machines prepare: for GPUs that the processors beside them cannot feed.

Each server is a dispatcher of tf.data's service with a worker of its own. The client gives them the steps in turn and
takes the batches in turn, so that they are those of a run without servers, in the same order. One dispatcher with all
the workers behind it would hand the batches out in the order in which they get done.
"""

import queue
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import tensorflow as tf

from pipeline.config.address import parse_address
from pipeline.errors import RunError, TrainingError

PREFETCH = 2  # batches that wait ready on a server's way to here
PATIENCE = 15.0  # seconds without a batch, after which it is asked whether the servers are there


def start_server(
    address: str,
) -> tuple[tf.data.experimental.service.DispatchServer, tf.data.experimental.service.WorkerServer]:
    """Start a server in this process; it ends with what is returned. It runs whatever graph it is sent: for trusted networks only.

    Args:
        address: host:port under which others reach this machine. The worker takes the port above.

    Raises:
        RunError: One of the ports is taken, or none.
    """
    (_, port), service = parse_address(address), tf.data.experimental.service
    own = address.removesuffix(f":{port}") + f":{port + 1}"
    try:
        for number in (port, port + 1):
            with socket.create_server(("", number)):
                pass
        dispatcher = service.DispatchServer(service.DispatcherConfig(port=port))
        worker = service.WorkerServer(
            service.WorkerConfig(dispatcher_address=f"localhost:{port}", worker_address=own, port=port + 1)
        )
    except (OSError, OverflowError, tf.errors.OpError) as error:
        raise RunError(
            f"--address {address}: cannot be served at ({error}); choose another port that is free, as is the one above it"
        ) from None
    return dispatcher, worker


def check_servers(addresses: Sequence[str]) -> None:
    """Make sure that every server is there.

    Raises:
        RunError: One is not.
    """
    for address in addresses:
        host, port = parse_address(address)
        for number in (port, port + 1):  # of the dispatcher and of the worker
            try:
                socket.create_connection((host, number), timeout=10).close()
            except (OSError, OverflowError) as error:
                raise RunError(
                    f"runtime.data_service: nothing answers at {host}:{number} ({error}); start it there by: python -m pipeline serve "
                    f"--address {address}"
                ) from None


def from_data_service(stream: Callable[[int, int], tf.data.Dataset], addresses: Sequence[str]) -> tf.data.Dataset:
    """The batches of a stream, prepared by servers.

    Args:
        stream: From the number of a server and of all of them to the batches that it prepares: the steps from its
            number on, as far apart as there are servers.
        addresses: host:port of each.

    Returns:
        The batches of `stream(0, 1)`, an infinite dataset.
    """
    service, number = tf.data.experimental.service, len(addresses)
    parts = [
        stream(i, number).apply(
            service.distribute(service.ShardingPolicy.OFF, f"grpc://{address}", max_outstanding_requests=PREFETCH)
        )
        for i, address in enumerate(addresses)
    ]
    whole = (
        parts[0] if number == 1 else tf.data.Dataset.choose_from_datasets(parts, tf.data.Dataset.range(number).repeat())
    )
    return whole.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)).prefetch(PREFETCH)


def with_watchdog(batches: Iterable[Any], addresses: Sequence[str], patience: float = PATIENCE) -> Iterator[Any]:
    """The same batches, and an end where a server is gone: TensorFlow alone would wait for it for ever.

    Raises:
        TrainingError: A server cannot be reached, or it failed.
    """
    ready: queue.Queue[Any] = queue.Queue(maxsize=1)
    closed = threading.Event()

    def put(item: Any) -> None:
        while not closed.is_set():
            with suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def fetch() -> None:
        try:
            for batch in batches:
                put(batch)
                if closed.is_set():
                    return
            put(StopIteration())
        except Exception as error:
            put(error)

    threading.Thread(target=fetch, daemon=True).start()
    try:
        while True:
            try:
                item = ready.get(timeout=patience)
            except queue.Empty:
                try:
                    check_servers(addresses)
                except RunError as error:
                    raise TrainingError(f"{error}; then go on with --resume") from None
                continue
            if isinstance(item, tf.errors.OpError):
                raise TrainingError(
                    f"a server of runtime.data_service failed ({item.message.splitlines()[0][:300]}); start the servers again and go on "
                    "with --resume"
                )
            if isinstance(item, StopIteration):
                return
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        closed.set()

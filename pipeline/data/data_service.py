"""Batches prepared by other machines, for GPUs that the local CPUs cannot keep busy.

Each server is a dispatcher of tf.data's service with a worker of its own. The client assigns the steps and
takes the batches in turn, so the batches and their order equal those of a run without servers. One dispatcher with all
workers would return the batches in the order in which they are completed.
"""

import queue
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import tensorflow as tf

from pipeline.config.address import parse_address
from pipeline.data.manifest import Manifest
from pipeline.distributed.listening import IPAddress, local_addresses, restrict_listeners
from pipeline.errors import DataError, RunError, TrainingError

PREFETCH = 2  # batches prefetched from a server
EVERY_ADDRESS = ("0.0.0.0", "::")
PATIENCE = 15.0  # seconds without a batch, after which the servers are checked


def start_server(
    address: str, bind: str | None = None
) -> tuple[tf.data.experimental.service.DispatchServer, tf.data.experimental.service.WorkerServer]:
    """Start a server in this process; it stops when the returned objects are deleted.

    It runs any graph that it receives: use it in trusted networks only.

    Args:
        address: host:port under which others reach this machine. The worker takes the port above.
        bind: Host name or address of this machine that the server answers at; None for the host of `address`, and
            0.0.0.0 or :: for every address.

    Raises:
        RunError: A port is in use or not valid, or the server cannot be restricted to the address.
    """
    (host, port), service = parse_address(address), tf.data.experimental.service
    bound = None if bind in EVERY_ADDRESS else _addresses_to_bind(address, host, bind)
    inner = "localhost" if bound is None else f"[{bound[0]}]" if bound[0].version == 6 else str(bound[0])
    own = address.removesuffix(f":{port}") + f":{port + 1}"
    try:
        for number in (port, port + 1):
            with socket.create_server(("", number)):
                pass
        dispatcher = service.DispatchServer(service.DispatcherConfig(port=port))
        worker = service.WorkerServer(
            service.WorkerConfig(dispatcher_address=f"{inner}:{port}", worker_address=own, port=port + 1)
        )
    except (OSError, OverflowError, tf.errors.OpError) as error:
        raise RunError(
            f"--address {address}: cannot be served at ({error}); choose another port, which is free and has a free "
            "port above it"
        ) from None
    if bound is not None:
        try:
            restrict_listeners((port, port + 1), bound)
        except OSError as error:
            raise RunError(
                f"--address {address}: this system cannot restrict the ports to one address ({error}); "
                "--bind 0.0.0.0 serves at every address of this machine"
            ) from None
    return dispatcher, worker


def _addresses_to_bind(address: str, host: str, bind: str | None) -> list[IPAddress]:
    """Return the addresses of this machine that the server answers at.

    Raises:
        RunError: The host is not this machine, or others know it by another address.
    """
    name, remedy = bind or host, "; --bind ADDRESS names one of this machine, --bind 0.0.0.0 all of them"
    try:
        addresses = local_addresses(name)
    except OSError as error:
        raise RunError(f"--address {address}: {name} is no address of this machine ({error}){remedy}") from None
    is_name = bind is None and not host.replace(".", "").isdigit() and ":" not in host
    if is_name and host != "localhost" and all(each.is_loopback for each in addresses):
        raise RunError(
            f"--address {address}: {host} means {addresses[0]} on this machine, which others cannot reach{remedy}"
        )
    return addresses


def check_servers(addresses: Sequence[str]) -> None:
    """Check that every server can be reached.

    Raises:
        RunError: A server cannot be reached.
    """
    for address in addresses:
        host, port = parse_address(address)
        for number in (port, port + 1):  # of the dispatcher and of the worker
            try:
                socket.create_connection((host, number), timeout=10).close()
            except (OSError, OverflowError) as error:
                raise RunError(
                    f"runtime.data_service: nothing answers at {host}:{number} ({error}); "
                    f"start it there by: python -m pipeline data-server --address {address}"
                ) from None


def check_servable(manifest: Manifest) -> None:
    """Check that no training image is decoded by a Python function, which stays in this process.

    Raises:
        DataError: An image is.
    """
    train = manifest.indices("train")
    by_pillow = train[manifest.transcoded[train]]
    if len(by_pillow):
        raise DataError(
            f"runtime.data_service: {len(by_pillow):,} training images, such as "
            f"{manifest.table['key'].iloc[by_pillow[0]]}, are decoded by Pillow, which servers cannot run; convert "
            "them to opaque PNG or JPEG, or set data_service to null"
        )


def from_data_service(stream: Callable[[int, int], tf.data.Dataset], addresses: Sequence[str]) -> tf.data.Dataset:
    """Return the batches of a stream, prepared by servers.

    Args:
        stream: Maps the index of a server and the number of servers to the batches that it prepares: the steps from
            its index on, at intervals of the number of servers.
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
    merged = (
        parts[0] if number == 1 else tf.data.Dataset.choose_from_datasets(parts, tf.data.Dataset.range(number).repeat())
    )
    return merged.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)).prefetch(PREFETCH)


def with_watchdog(batches: Iterable[Any], addresses: Sequence[str], patience: float = PATIENCE) -> Iterator[Any]:
    """Yield the batches, and raise if a server is gone: TensorFlow alone would wait for it forever.

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

    def produce() -> None:
        try:
            for batch in batches:
                put(batch)
                if closed.is_set():
                    return
            put(StopIteration())
        except Exception as error:
            put(error)

    threading.Thread(target=produce, daemon=True).start()
    try:
        while True:
            try:
                item = ready.get(timeout=patience)
            except queue.Empty:
                try:
                    check_servers(addresses)
                except RunError as error:
                    raise TrainingError(f"{error}; then continue with --resume") from None
                continue
            if isinstance(item, tf.errors.OpError):
                raise TrainingError(
                    f"a server of runtime.data_service failed ({item.message.splitlines()[0][:300]}); "
                    "start the servers again and continue with --resume"
                )
            if isinstance(item, StopIteration):
                return
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        closed.set()

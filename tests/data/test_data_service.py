"""Servers prepare the very batches that this process would have prepared, in its order.

And a run ends where one of them is gone.
"""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from pipeline.config.loader import load_config
from pipeline.config.schema import Config
from pipeline.data import data_service
from pipeline.data.data_service import check_servers, from_data_service, start_server, with_watchdog
from pipeline.data.input_pipeline import training_stream
from pipeline.data.sources.catalog import open_source
from pipeline.data.validation import scan
from pipeline.distributed.sharding import Shard
from pipeline.errors import ConfigError, RunError, TrainingError

PROJECT = Path(__file__).parents[2]


def free_port() -> int:
    """One that is free, as is the one above it."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as server, suppress(OSError):
            port = int(server.getsockname()[1])
            with socket.create_server(("127.0.0.1", port + 1)):
                return port


def serve(address: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipeline", "data-server", "--address", address]
    return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def first_line(server: "subprocess.Popen[str]") -> str:
    assert server.stdout is not None
    return server.stdout.readline()


@pytest.fixture(scope="module")
def process() -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """A server that is a process of its own, with its address."""
    address = f"127.0.0.1:{free_port()}"
    server = serve(address)
    assert first_line(server).startswith(f"serving at {address} with ")
    assert "answer at 127.0.0.1 only; whoever reaches them can run code as you" in first_line(server)
    yield address, server
    server.kill()
    server.communicate()


@pytest.fixture(scope="module")
def servers(process: tuple[str, "subprocess.Popen[str]"]) -> Iterator[list[str]]:
    """Two servers: a process of its own, and one in this process."""
    address = f"127.0.0.1:{free_port()}"
    server = start_server(address)
    yield [process[0], address]
    del server


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for label in "ab":
        (folder / label).mkdir()
        for number in range(20):
            image = rng.integers(0, 256, (40 + number, 48, 3)).astype(np.uint8)
            Image.fromarray(image).save(folder / label / f"{number}.jpg")
    return folder


@pytest.mark.parametrize(
    ("number", "share", "randaugment"),
    [
        pytest.param(1, Shard(), {"num_ops": 2, "magnitude": 9}, id="all of one"),
        pytest.param(2, Shard(1, 2), None, id="a share of two"),
        pytest.param(1, Shard(1, 2), None, id="a share of one", marks=pytest.mark.slow),
        pytest.param(2, Shard(), {"num_ops": 2, "magnitude": 9}, id="all of two", marks=pytest.mark.slow),
    ],
)
def test_the_batches_of_servers_are_those_of_this_process(
    servers: list[str], images: Path, number: int, share: Shard, randaugment: dict[str, int] | None
) -> None:
    config = Config.model_validate(
        {
            "model": {"variant": "b0", "weights": None, "resolution": 32},
            "data": {"source": "folder", "path": str(images)},
            "augment": {
                "transforms": ["RandomResizedCrop", "HorizontalFlip"],
                "randaugment": randaugment,
                "mixup": 0.2,
            },
            "train": {"global_batch_size": 16},
            "runtime": {"data_service": servers[:number]},
        }
    )
    source = open_source(config.data)
    manifest = scan(source, config.data, seed=1)

    def stream(server: int, of: int) -> tf.data.Dataset:
        return training_stream(
            manifest, source, config, 16, start_step=2 + server, stride=of, shard=share, num_workers=tf.data.AUTOTUNE
        )

    dataset = from_data_service(stream, servers[:number])
    assert dataset.cardinality() == tf.data.INFINITE_CARDINALITY
    here = training_stream(manifest, source, config, 16, start_step=2, shard=share).take(7).as_numpy_iterator()
    for one, other in zip(dataset.take(7).as_numpy_iterator(), here, strict=True):
        for there_part, here_part in zip(one, other, strict=True):
            np.testing.assert_array_equal(there_part, here_part)


def test_a_run_ends_where_a_server_is_gone() -> None:
    """TensorFlow alone would wait for it for ever."""
    address = f"127.0.0.1:{free_port()}"

    def stuck() -> Iterator[int]:
        yield 1
        time.sleep(60)

    batches = with_watchdog(stuck(), [address], patience=0.2)
    assert next(batches) == 1
    with pytest.raises(TrainingError, match=f"nothing answers at {address} .*; then continue with --resume"):
        next(batches)


def test_a_slow_server_is_waited_for(servers: list[str]) -> None:
    def slow() -> Iterator[int]:
        time.sleep(0.7)
        yield 1

    assert next(with_watchdog(slow(), servers, patience=0.2)) == 1


def test_what_goes_wrong_on_a_server_is_named() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise tf.errors.NotFoundError(None, None, "no such file: a.jpg\nmore")

    batches = with_watchdog(broken(), ["127.0.0.1:1"])
    assert next(batches) == 1
    with pytest.raises(
        TrainingError, match=r"a server of runtime.data_service failed \(no such file: a.jpg\); start the servers again"
    ):
        next(batches)


def test_other_errors_and_an_end_come_through() -> None:
    assert list(with_watchdog([1, 2], ["127.0.0.1:1"])) == [1, 2]

    def broken() -> Iterator[int]:
        yield 1
        raise ValueError("odd")

    with pytest.raises(ValueError, match="odd"):
        list(with_watchdog(broken(), ["127.0.0.1:1"]))


def test_a_server_that_is_not_there_is_named(servers: list[str]) -> None:
    check_servers(servers)
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(
        RunError,
        match=f"nothing answers at {address} .*; start it there by: python -m pipeline data-server --address {address}",
    ):
        check_servers([servers[0], address])


def test_a_port_that_is_taken_is_named(servers: list[str]) -> None:
    with pytest.raises(RunError, match=f"--address {servers[0]}: cannot be served at"):
        start_server(servers[0])


def answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=0.5).close()
    except OSError:
        return False
    return True


def test_a_server_answers_at_its_address_only(servers: list[str]) -> None:
    for server in servers:  # a process of its own, and one in this process
        port = int(server.rpartition(":")[2])
        for number in (port, port + 1):
            assert answers("127.0.0.1", number)
            assert not answers("127.0.0.2", number)
            assert not answers("::1", number)


def test_a_server_that_is_bound_to_every_address_answers_at_each() -> None:
    port = free_port()
    server = start_server(f"127.0.0.1:{port}", "0.0.0.0")
    assert all(answers(host, number) for host in ("127.0.0.1", "127.0.0.2") for number in (port, port + 1))
    del server


@pytest.mark.parametrize(
    ("address", "bind", "message"),
    [
        ("192.0.2.1:5050", None, "192.0.2.1 is no address of this machine .*; --bind ADDRESS names one of"),
        ("127.0.0.1:5050", "192.0.2.1", "192.0.2.1 is no address of this machine"),
        ("no-such-host.invalid:5050", None, "no-such-host.invalid is no address of this machine"),
    ],
)
def test_an_address_of_another_machine_is_refused(address: str, bind: str | None, message: str) -> None:
    with pytest.raises(RunError, match=message):
        start_server(address, bind)


def test_a_name_that_only_this_machine_knows_by_its_loopback_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_service, "local_addresses", lambda name: [ip_address("127.0.1.1")])
    with pytest.raises(RunError, match=r"host1 means 127\.0\.1\.1 on this machine, which others cannot reach"):
        start_server("host1:5050")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["augment.backend=albumentations"], "albumentations runs Python functions, which servers cannot run"),
        (["data.source=tfds", "data.name=tf_flowers", "data.path=null"], "source tfds runs Python functions"),
        (["runtime.data_service=[]"], "runtime.data_service"),
        (["runtime.data_service=[host]"], "runtime.data_service"),
    ],
)
def test_what_does_not_travel_is_refused(settings: list[str], message: str, images: Path) -> None:
    first = "runtime.data_service=[host:1]"
    with pytest.raises(ConfigError, match=message):
        load_config(PROJECT / "configs/lite0_folder.yaml", [f"data.path={images}", first, *settings])


def test_a_server_ends_when_asked(process: tuple[str, "subprocess.Popen[str]"]) -> None:
    """The last test: nothing answers at its address any more."""
    address, server = process
    check_servers([address])
    server.send_signal(signal.SIGTERM)
    assert server.wait(timeout=30) == 0
    assert server.communicate() == ("", "")

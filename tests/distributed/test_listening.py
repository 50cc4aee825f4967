"""Listening sockets that answer at some addresses only, whatever they were bound to."""

import socket
from collections.abc import Iterator

import pytest

from pipeline.distributed.listening import local_addresses, restrict_listeners

HOSTS = ("127.0.0.1", "127.0.0.2", "::1")


@pytest.fixture
def port() -> Iterator[int]:
    """The port of a socket that listens at every address, of IPv4 and IPv6."""
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        yield int(listener.getsockname()[1])


def answering(port: int) -> list[str]:
    found = []
    for host in HOSTS:
        try:
            socket.create_connection((host, port), timeout=0.3).close()
            found.append(host)
        except OSError:
            pass
    return found


@pytest.mark.parametrize("hosts", [["127.0.0.1"], ["127.0.0.2"], ["::1"], ["127.0.0.2", "::1"], list(HOSTS)])
def test_only_the_addresses_that_are_named_are_answered(port: int, hosts: list[str]) -> None:
    assert answering(port) == list(HOSTS)
    restrict_listeners({port}, [address for host in hosts for address in local_addresses(host)])
    assert answering(port) == hosts


def test_data_pass_the_filter_of_a_connection(port: int) -> None:
    with socket.create_server(("0.0.0.0", 0)) as listener:
        number = listener.getsockname()[1]
        restrict_listeners({number}, local_addresses("127.0.0.1"))
        with socket.create_connection(("127.0.0.1", number), timeout=5) as client:
            server, _ = listener.accept()
            with server:
                client.sendall(b"x" * 1_000_000)
                received = 0
                while received < 1_000_000:
                    received += len(server.recv(65536))
                assert received == 1_000_000


def test_a_port_without_a_listener_is_an_error(port: int) -> None:
    with pytest.raises(OSError, match="no socket listens on 1"):
        restrict_listeners({1, port}, local_addresses("127.0.0.1"))


def test_an_address_of_another_machine_is_an_error() -> None:
    with pytest.raises(OSError, match="assign requested address"):
        local_addresses("192.0.2.1")

"""host:port, wherever a user writes it."""

import pytest

from pipeline.config.address import parse_address


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [("host1:5050", "host1", 5050), ("10.0.0.1:1", "10.0.0.1", 1), ("[fe80::1]:65535", "fe80::1", 65535)],
)
def test_an_address_is_a_host_and_a_port(address, host, port):
    assert parse_address(address) == (host, port)


@pytest.mark.parametrize(
    "address", ["host", "host:", ":5050", "host:x", "host:0", "host:65536", "host:99999", "a b:1", "fe80::1:80", ""]
)
def test_what_is_none_is_refused(address):
    with pytest.raises(ValueError, match="is no address; write it like host1:5050"):
        parse_address(address)

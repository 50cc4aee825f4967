"""Addresses of the form host:port, as in TF_CONFIG, the config and the command line."""

import re


def parse_address(address: str) -> tuple[str, int]:
    """Split an address into host and port.

    Args:
        address: host:port; an IPv6 address is written in brackets.

    Returns:
        The host without brackets, and the port.

    Raises:
        ValueError: The text is not an address.
    """
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:]+)\]|([^\s:\[\]]+)):(\d{1,5})", address)
    if match is None or not 0 < int(match[3]) < 2**16:
        raise ValueError(f"{address} is no address; write it like host1:5050")
    return match[1] or match[2], int(match[3])

"""Addresses in the config and on the command line: host:port, and files such as s3://BUCKET/FILE."""

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


def is_address(text: str) -> bool:
    """Return whether a text is the address of a file, not a path on this machine."""
    return "://" in text

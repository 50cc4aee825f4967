"""Listening sockets of compiled libraries, restricted to the addresses that they are meant for.

The servers of tf.data's service always listen on every interface of the machine (`0.0.0.0` is written into TensorFlow).
A filter that the kernel attaches to their sockets, a program of a few instructions, drops every packet to another
address: a client that tries one waits in vain.
"""

import ctypes
import ipaddress
import os
import socket
import stat
import struct
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
SO_ATTACH_FILTER = 26  # of Linux; Python's module socket does not have it
# Instructions of classic BPF, from linux/bpf_common.h.
LOAD_BYTE, LOAD_WORD, SHIFT_RIGHT, JUMP_IF_EQUAL, RETURN = 0x30, 0x20, 0x74, 0x15, 0x06
NETWORK_HEADER = 0xFFF00000  # SKF_NET_OFF: the offset at which a filter finds the IP header
DESTINATION = {4: 16, 6: 24}  # of the destination address in the IP header
ACCEPT, DROP = 0xFFFFFFFF, 0


def local_addresses(host: str) -> list[IPAddress]:
    """Return the addresses of this machine that a host name or an address stands for.

    Raises:
        OSError: The name is unknown, or an address is not one of this machine.
    """
    found = {entry[4][0] for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    addresses = [ipaddress.ip_address(str(text).partition("%")[0]) for text in sorted(found, key=str)]
    for address in addresses:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        with socket.socket(family) as trial:
            trial.bind((str(address), 0))
    return addresses


def restrict_listeners(ports: Collection[int], addresses: Sequence[IPAddress]) -> None:
    """Make the listening sockets of this process accept connections to some addresses only.

    Args:
        ports: Ports whose sockets are restricted.
        addresses: Addresses of this machine.

    Raises:
        OSError: The kernel does not accept the filter.
    """
    instructions = b"".join(struct.pack("=HBBI", *instruction) for instruction in _filter(addresses))
    program = ctypes.create_string_buffer(instructions)
    option = struct.pack("@HP", len(instructions) // 8, ctypes.addressof(program))
    restricted = set()
    for listener in _listeners():
        with listener:
            if (port := listener.getsockname()[1]) in ports:
                listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, option)
                restricted.add(port)
    if restricted != set(ports):
        raise OSError(f"no socket listens on {', '.join(map(str, sorted(set(ports) - restricted)))}")


def _filter(addresses: Sequence[IPAddress]) -> Iterator[tuple[int, int, int, int]]:
    """Yield instructions (code, jump if true, jump if false, operand) that accept packets to the addresses."""
    for address in addresses:
        words = struct.unpack(f"!{len(address.packed) // 4}I", address.packed)
        after = 2 * len(words) + 1  # instructions up to those of the next address
        yield LOAD_BYTE, 0, 0, NETWORK_HEADER
        yield SHIFT_RIGHT, 0, 0, 4
        yield JUMP_IF_EQUAL, 0, after, address.version
        for i, word in enumerate(words):
            yield LOAD_WORD, 0, 0, NETWORK_HEADER + DESTINATION[address.version] + 4 * i
            yield JUMP_IF_EQUAL, 0, after - 2 * (i + 1), word
        yield RETURN, 0, 0, ACCEPT
    yield RETURN, 0, 0, DROP


def _listeners() -> Iterator[socket.socket]:
    """Yield a duplicate of every listening TCP socket of this process."""
    for entry in list(Path("/proc/self/fd").iterdir()):
        with suppress(OSError):  # closed meanwhile
            descriptor = int(entry.name)
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            duplicate = socket.socket(fileno=os.dup(descriptor))
            if duplicate.family in (socket.AF_INET, socket.AF_INET6) and duplicate.getsockopt(
                socket.SOL_SOCKET, socket.SO_ACCEPTCONN
            ):
                yield duplicate
            else:
                duplicate.close()

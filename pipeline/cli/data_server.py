"""Serve batches to runs on other machines, for `runtime.data_service`."""

import argparse
import os
import signal
import threading
from collections.abc import Sequence

from pipeline.cli.arguments import command_parser
from pipeline.config.address import parse_address
from pipeline.console import Console


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser(
        "data-server",
        "Read, decode and augment images for the runs whose runtime.data_service names this address. The images "
        "must have the same path on both machines.",
        epilog="There is no password: whoever reaches the port, every user of this machine included, can run code and "
        "read files on it as you. Serve in networks that you trust, or bind 127.0.0.1 and use an SSH tunnel.",
    )
    parser.add_argument(
        "--address",
        required=True,
        metavar="HOST:PORT",
        help="the address of this machine as other machines see it, as in the config",
    )
    parser.add_argument(
        "--bind",
        metavar="HOST",
        help="the address of this machine to answer at, where it is not that of --address, as in a container; 0.0.0.0 "
        "for every address (default: the host of --address)",
    )
    arguments = parser.parse_args(argv)
    try:
        parse_address(arguments.address)
    except ValueError as error:
        parser.error(f"--address: {error}")
    return arguments


def main(console: Console, argv: Sequence[str] | None = None) -> int:
    """Serve batches until SIGTERM or Ctrl-C, and return the exit code.

    Args:
        console: Console for the output.
        argv: Arguments; None takes those of the process.
    """
    arguments = parse_arguments(argv)
    console.redirect_library_output(None)

    import tensorflow as tf

    from pipeline.data.data_service import EVERY_ADDRESS, start_server

    tf.config.set_visible_devices([], "GPU")
    server = start_server(arguments.address, arguments.bind)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stop.set())
    host, port = parse_address(arguments.address)
    bind = arguments.bind or host
    console.print(f"serving at {arguments.address} with {os.cpu_count()} processor cores; stop it with Ctrl-C")
    console.print(
        f"ports {port} and {port + 1} answer at "
        + ("every address of this machine" if bind in EVERY_ADDRESS else f"{bind} only")
        + "; whoever reaches them can run code as you"
    )
    while not stop.wait(0.5):
        pass
    del server
    return 0

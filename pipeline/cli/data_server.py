"""python -m pipeline serve: prepares batches for runs on other machines, for `runtime.data_service`."""

import argparse
import os
import signal
import threading
from collections.abc import Sequence

from pipeline.config.address import parse_address
from pipeline.console import Console


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """The command line behind the program's name."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline serve",
        description="Read, decode and augment pictures for the runs whose runtime.data_service names this address. The pictures have to be "
        "here under the same path as there.",
        epilog="Whoever reaches the port can have this machine compute and read anything: for trusted networks.",
    )
    parser.add_argument(
        "--address", required=True, metavar="HOST:PORT", help="under which others reach this machine, as in the config"
    )
    arguments = parser.parse_args(words)
    try:
        parse_address(arguments.address)
    except ValueError as error:
        parser.error(f"--address: {error}")
    return arguments


def main(words: Sequence[str], screen: Console) -> int:
    """Runs the program until it is asked to stop; returns its exit code."""
    arguments = parse_arguments(words)
    screen.redirect_library_output(None)

    import tensorflow as tf

    from pipeline.data.data_service import start_server

    tf.config.set_visible_devices([], "GPU")
    server = start_server(arguments.address)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stop.set())
    screen.print(f"serving at {arguments.address} with {os.cpu_count()} processor cores; Ctrl-C ends it")
    while not stop.wait(0.5):
        pass
    del server
    return 0

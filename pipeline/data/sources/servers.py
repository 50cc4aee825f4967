"""Servers that data sets are downloaded from.

The libraries retry an unreachable server for a long time, tensorflow-datasets for minutes, and wait forever for a
server that does not answer. Therefore the servers are checked first, each in a thread, because name resolution has no
time limit.
"""

import textwrap
import threading
import time
from collections.abc import Iterable
from urllib.parse import urlsplit

REACH_SECONDS = 12.0  # for all servers together


def unreachable(urls: Iterable[str], seconds: float) -> dict[str, str]:
    """Return the URLs that do not answer, and why; one URL is requested per server.

    Args:
        urls: URLs. Only http and https are checked.
        seconds: Time limit for all servers together.

    Returns:
        URL to reason; empty if every server answered.
    """
    servers = {urlsplit(url).netloc: url for url in sorted(urls, reverse=True) if url.startswith("http")}
    reasons = dict.fromkeys(servers.values(), f"no answer within {seconds:g} s")
    threads = [threading.Thread(target=_request, args=(url, seconds, reasons), daemon=True) for url in servers.values()]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return {url: reason for url, reason in dict(reasons).items() if reason}


def _request(url: str, seconds: float, reasons: dict[str, str]) -> None:
    import requests

    try:
        with requests.get(url, stream=True, timeout=seconds) as response:
            reasons[url] = f"the server answers {response.status_code}" if response.status_code >= 500 else ""
    except requests.RequestException as error:
        reasons[url] = short_message(error.args[0].reason if error.args and hasattr(error.args[0], "reason") else error)


def short_message(error: BaseException) -> str:
    """Return the message of an error on one line, of up to 500 characters."""
    return textwrap.shorten(str(error), 500) or type(error).__name__

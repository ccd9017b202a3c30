"""No socket of a test leads out of this machine; processes that a test starts import this by its name.

An audit hook sees every connection that Python makes, by whatever library. Local addresses stay open: some
tests serve a page or exchange tensors between processes.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
from typing import Any

NAMES = {"", "localhost", "localhost.localdomain", "ip6-localhost"}


class OfflineError(ConnectionRefusedError):
    """A test wanted to talk to another machine."""


def is_local(host: object) -> bool:
    """Does the address, or the name, mean this machine?"""
    name = host.decode() if isinstance(host, bytes) else host
    if name is None or name in NAMES or name == socket.gethostname():
        return True
    try:
        address = ipaddress.ip_address(str(name).partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified or _is_own(address)


def _is_own(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """A socket can only be bound to an address of this machine."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except OSError:
        return False
    return True


def _hook(event: str, given: tuple[Any, ...]) -> None:
    if event == "socket.connect":
        _, target = given
        where = target[0] if isinstance(target, tuple) else None  # a path: a socket of this machine
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        where = given[0]
    elif event == "socket.sendto":
        where = given[1][0] if isinstance(given[1], tuple) else None
    else:
        return
    if not is_local(where):
        raise OfflineError(f"tests run without a network, and something asked for {where!r}")


sys.addaudithook(_hook)

"""Which interface leads to the gang's master; gloo would ask the hostname, which many containers cannot resolve."""

from __future__ import annotations

import fcntl
import os
import socket
import struct

_SIOCGIFADDR = 0x8915


def local_address_towards(host: str) -> str | None:
    """The address of this machine from which packets to `host` leave; None when there is no route or no such name."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # UDP: chooses a route and sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return None


def interface_of(address: str) -> str | None:
    """Name of the interface that carries `address` (IPv4 or IPv6), as the kernel lists it."""
    for _, name in socket.if_nameindex():
        if address in (_ipv4(name), *_ipv6(name)):
            return name
    return None


def bind_gloo(master: str) -> str | None:
    """Points gloo at the interface that leads to `master`, unless the environment names one. Returns its name."""
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return os.environ["GLOO_SOCKET_IFNAME"]
    address = local_address_towards(master)
    name = interface_of(address) if address else None
    if name:
        os.environ["GLOO_SOCKET_IFNAME"] = name
    return name


def _ipv4(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            packed = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(packed[20:24])


def _ipv6(interface: str) -> list[str]:
    try:
        with open("/proc/net/if_inet6", encoding="ascii") as table:
            rows = [line.split() for line in table]
    except OSError:
        return []
    return [socket.inet_ntop(socket.AF_INET6, bytes.fromhex(row[0])) for row in rows if row[-1] == interface]

"""Attacks that use the network or create sockets."""

import socket
from typing import Any

Targets = dict[str, Any]


def connects_by_tcp(targets: Targets, logits: Any) -> str:
    with socket.create_connection(("127.0.0.1", targets["tcp"]), timeout=2) as sock:
        sock.sendall(b"hello")
    return "connected"


def sends_by_udp(targets: Targets, logits: Any) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"hello", ("127.0.0.1", targets["udp"]))


def creates_an_ipv6_socket(targets: Targets, logits: Any) -> str:
    socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    return "an IPv6 socket"


def sends_a_request_to_the_server(targets: Targets, logits: Any) -> str:
    import urllib.request

    with urllib.request.urlopen(targets["url"] + "/healthz", timeout=2) as answer:
        return str(answer.read())


def listens(targets: Targets, logits: Any) -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
    return "listening"


def resolves_a_name(targets: Targets, logits: Any) -> str:
    return str(socket.getaddrinfo("example.com", 80))


def creates_a_unix_socket(targets: Targets, logits: Any) -> str:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind("\0tinkerbell-hostile")
    return "bound"


def creates_a_raw_socket(targets: Targets, logits: Any) -> str:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    return "a raw socket"


def creates_a_netlink_socket(targets: Targets, logits: Any) -> str:
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
    return "a netlink socket"

"""Talking to somebody outside."""

import socket
from typing import Any

Where = dict[str, Any]


def connects_by_tcp(where: Where, logits: Any) -> str:
    with socket.create_connection(("127.0.0.1", where["tcp"]), timeout=2) as sock:
        sock.sendall(b"hello")
    return "connected"


def sends_by_udp(where: Where, logits: Any) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"hello", ("127.0.0.1", where["udp"]))


def connects_by_ipv6(where: Where, logits: Any) -> str:
    socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    return "an IPv6 socket"


def asks_the_server_itself(where: Where, logits: Any) -> str:
    import urllib.request

    with urllib.request.urlopen(where["url"] + "/healthz", timeout=2) as answer:
        return str(answer.read())


def listens(where: Where, logits: Any) -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
    return "listening"


def resolves_a_name(where: Where, logits: Any) -> str:
    return str(socket.getaddrinfo("example.com", 80))


def makes_a_unix_socket(where: Where, logits: Any) -> str:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind("\0tinkerbell-hostile")
    return "bound"


def makes_a_raw_socket(where: Where, logits: Any) -> str:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    return "a raw socket"


def talks_to_the_kernel(where: Where, logits: Any) -> str:
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
    return "a netlink socket"

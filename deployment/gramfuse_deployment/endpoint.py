"""Addresses of the deployment: parse hosts and ports, and probe whether a port is free, listening or healthy."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import urllib.error
import urllib.request
from pathlib import Path

from gramfuse_protocol.errors import FederationError, PlanError

SECONDS = 5.0


def host_of(address: str) -> str:
    """Return the host of `host:port`, without the brackets of an IPv6 address."""
    return address.rpartition(":")[0].strip("[]")


def port_of(address: str) -> int:
    """Return the port of `host:port`."""
    return int(address.rpartition(":")[2])


def is_loopback(host: str) -> bool:
    """Return whether a host is a loopback address or "localhost". Other names are not resolved."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listening_address(host: str, port: int) -> str:
    """Return `host:port` for a configuration file, with brackets around an IPv6 address.

    Raises:
        PlanError: if the host is not a plain IP address (without a scope such as %eth0, which could be any text), or
            the port is out of range.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = None
    if address is None or "%" in host:
        raise PlanError(f"{host!r} is not an IP address of this machine; expected one such as 10.0.0.5 or fd00::5")
    if not 0 < port < 65536:
        raise PlanError(f"{port} is not a port; expected 1 to 65535")
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def free_port() -> int:
    """Return a free TCP port on 127.0.0.1."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def check_free(host: str, port: int) -> None:
    """Raise FederationError if this machine cannot listen on an address.

    Args:
        host: an IP address.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise FederationError(
            f"{host}:{port}: cannot listen there: {error.strerror}; end the program that uses it, or choose another "
            "--host or --port"
        ) from None


def listens(host: str, port: int) -> bool:
    """Return whether a TCP connection to an address succeeds."""
    try:
        socket.create_connection((host, port), SECONDS).close()
    except OSError:
        return False
    return True


def healthy(port: int, ca: Path | None) -> bool:
    """Return whether a Flower server on 127.0.0.1 reports that it is up.

    Args:
        ca: PEM file of the authority to trust; None means no TLS.

    Raises:
        FederationError: if its certificate is not trusted.
    """
    context = ssl.create_default_context(cafile=ca) if ca else None
    url = f"http{'s' if ca else ''}://127.0.0.1:{port}/health"
    try:
        with urllib.request.urlopen(url, timeout=SECONDS, context=context) as answer:  # noqa: S310  # loopback
            return bool(answer.status == 200)
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise FederationError(
                f"127.0.0.1:{port}: the certificate is not trusted ({error.reason.verify_message}); expected one for "
                f"127.0.0.1, signed by the authority in {ca}; make it with: gramfuse pki server DIR --renew"
            ) from None
        return False
    except OSError:
        return False

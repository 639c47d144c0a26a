"""An address of the deployment: whether something listens there, whether it can be trusted, what is in the way."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from gramfuse_protocol.errors import FederationError

SECONDS = 5.0
MOST_AHEAD, MOST_BEHIND = 5.0, 300.0
"""Seconds between a node's clock and the SuperLink's, beyond which Flower refuses the node."""

_WRONG_HOST = (62, 64)
"""OpenSSL's numbers for a certificate of another name, and of another IP address."""


def host_of(address: str) -> str:
    """Return the host of `host:port`; an IPv6 address has brackets there, and none here."""
    return address.rpartition(":")[0].strip("[]")


def port_of(address: str) -> int:
    """Return the port of `host:port`."""
    return int(address.rpartition(":")[2])


def is_loopback(host: str) -> bool:
    """Return whether a host, as it is written, is this machine itself. Other names are not looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def check_free(host: str, port: int) -> None:
    """Raise FederationError if this machine cannot listen there.

    Args:
        host: an IP address.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise FederationError(
            f"{host}:{port}: cannot listen there: {error.strerror}; end what does, or choose --host and --port anew"
        ) from None


def listens(host: str, port: int) -> bool:
    """Return whether somebody listens there."""
    try:
        socket.create_connection((host, port), SECONDS).close()
    except OSError:
        return False
    return True


def healthy(port: int, ca: Path | None) -> bool:
    """Return whether a Flower server on 127.0.0.1 says that it is up.

    Args:
        ca: PEM file of the authority that it is trusted by; None is without TLS.

    Raises:
        FederationError: if its certificate is not to be trusted.
    """
    context = ssl.create_default_context(cafile=ca) if ca else None
    url = f"http{'s' if ca else ''}://127.0.0.1:{port}/health"
    try:
        with urllib.request.urlopen(url, timeout=SECONDS, context=context) as answer:  # noqa: S310  # loopback
            return bool(answer.status == 200)
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise FederationError(_distrust(error.reason, f"127.0.0.1:{port}", ca)) from None
        return False
    except OSError:
        return False


def obstacle(address: str, ca: Path | None) -> str:
    """Return what keeps this machine from talking to a coordinator, and what to do; empty if nothing does.

    Args:
        address: its `host:port`.
        ca: PEM file of the authority that it is trusted by; None is without TLS.
    """
    host, port = host_of(address), port_of(address)
    connection: http.client.HTTPConnection
    try:
        if ca:
            context = ssl.create_default_context(cafile=ca)
            connection = http.client.HTTPSConnection(host, port, timeout=SECONDS, context=context)
        else:
            connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
        try:
            connection.request("GET", "/")
            date = connection.getresponse().headers["Date"]
        finally:
            connection.close()
    except ssl.SSLCertVerificationError as error:
        return _distrust(error, address, ca)
    except ssl.SSLError as error:
        return f"{address} does not speak TLS as expected ({error.reason}); is it the coordinator's address?"
    except http.client.HTTPException:
        return f"{address} is no coordinator: it does not speak HTTP{'S' if ca else ''}"
    except OSError as error:
        why = error.strerror or str(error) or type(error).__name__
        return (
            f"cannot reach {address} yet ({why}); is the coordinator up, and do the firewalls let this machine through?"
        )
    return _skew(date, address)


def _distrust(error: ssl.SSLCertVerificationError, address: str, ca: Path | None) -> str:
    if error.verify_code in _WRONG_HOST:
        return (
            f"the certificate of {address} is for other names ({error.verify_message}); dial one of those, or have the "
            "coordinator make another: gramfuse pki server DIR --host HOST --renew"
        )
    return (
        f"{address} cannot be trusted ({error.verify_message}); expected a certificate by the authority in {ca}: put "
        "the coordinator's present ca.crt there, from a source that you trust"
    )


def _skew(date: str | None, address: str) -> str:
    try:
        theirs = parsedate_to_datetime(date or "")
    except ValueError:
        return ""
    ahead = time.time() - theirs.replace(tzinfo=theirs.tzinfo or UTC).timestamp()
    if -MOST_BEHIND < ahead < MOST_AHEAD + 1:  # a Date header has whole seconds
        return ""
    return (
        f"this machine's clock says {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, that of {address} {date}; Flower "
        f"refuses a node more than {MOST_AHEAD:.0f} s ahead or {MOST_BEHIND:.0f} s behind: set the clocks right (NTP)"
    )

"""How a silo reaches its coordinator: name and port, TLS, the proxy and what is behind it, and the time there.

Nothing of the silo's is sent: a TLS handshake, and a few requests without content that change nothing anywhere.
"""

from __future__ import annotations

import hashlib
import http.client
import socket
import ssl
import threading
import time
import urllib.request
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

from cryptography import x509

from gramfuse_client.dry_run.findings import Findings
from gramfuse_client.silo_file import Silo
from gramfuse_protocol.errors import PlanError

STEP_SECONDS = 5.0
"""Longest wait for one step."""
CONNECTION_SECONDS = 30.0
"""Longest wait for all of them, and for the host's name to be found."""

AHEAD = timedelta(seconds=5)
"""Flower refuses what is signed further in the future than this."""
APART = timedelta(seconds=60)
"""Flower refuses what was signed 300 s ago; a clock that is off by a fifth of that is not kept."""
EARLIEST = datetime(2026, 1, 1, tzinfo=UTC)
"""Before this there was no gramfuse."""
EXPIRY_NOTICE = timedelta(days=30)

FLEET = "/v1/fleet/"
NOTHING = "/v1/fleet/nothing"
"""A call that Flower does not have: the proxy lets it through, and what is behind it says so."""
HIDDEN = ("/v1/control/", "/v1/control/start-run", "/v1/runtime/acquire-task")
"""What a silo must not be able to reach. Flower answers 404 to the first of them too, and 405 to the others."""

REMOTE = ("connection", "certificate", "SuperLink", "coordinator's clock", "control API")
"""What is looked at from here, in order."""
OPERATOR = "the coordinator's operator"
EXPIRED, NOT_YET, OTHER_HOST, OTHER_ADDRESS = 10, 9, 62, 64
"""OpenSSL's X509_V_ERR_CERT_HAS_EXPIRED and the like."""
SET_CLOCK = "have this machine's clock kept, for instance: timedatectl set-ntp true"


def obstacle(silo: Silo, *, tls: bool) -> str:
    """Return, in one line, what keeps a silo from its coordinator and what to do; empty if nothing does.

    Args:
        tls: False for a coordinator on this machine that speaks none.
    """
    found = Findings()
    check_coordinator(found, silo, tls=tls)
    first = [f"{problem.subject}: {problem.what}; {problem.remedy}" for problem in found.problems[:1]]
    return " ".join(" ".join(first).split())


def check_coordinator(found: Findings, silo: Silo, *, tls: bool = True, offline: bool = False) -> None:
    """Look at the coordinator: a finding for each of REMOTE. It is over in time, whatever the other side does."""
    try:
        address = silo.coordinator.address
    except PlanError as error:
        found.error("coordinator", error)
        return
    context = _trust(found, silo) if tls else None
    seen = Findings()
    if not offline and (context is not None or not tls):
        # A name server can take longer than any time-out here, so all of it is given up after a while.
        thread = threading.Thread(target=_look, args=(seen, silo, context), daemon=True)
        thread.start()
        thread.join(CONNECTION_SECONDS)
        over, seen = not thread.is_alive(), Findings(seen)
        if not over and len(seen) < len(REMOTE):
            what = f"{address}: it took more than {CONNECTION_SECONDS:.0f} s"
            seen.problem(REMOTE[len(seen)], what, f"try again; ask {OPERATOR}, or who runs the network")
    found.extend(seen)
    for subject in REMOTE[len(seen) :]:
        found.skip(subject, "not looked at, as --offline says" if offline else "needs what comes before it")


def _trust(found: Findings, silo: Silo) -> ssl.SSLContext | None:
    """Return a context that trusts what Flower will trust here."""
    path, context = silo.ca_path, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cafile=path)
    except OSError as error:  # ssl's errors are among them
        why = "holds no certificate in PEM" if isinstance(error, ssl.SSLError) else error.strerror
        remedy = f"get ca.crt from {OPERATOR}, and compare its SHA-256 over another way"
        found.problem("authority", f"{path}: {why}", remedy)
        return None
    digests = [hashlib.sha256(certificate).digest().hex(":").upper() for certificate in context.get_ca_certs(True)]
    found.ok("authority", "\n".join([str(path), *(f"SHA-256 {digest}" for digest in digests)]))
    return context


def _look(found: Findings, silo: Silo, context: ssl.SSLContext | None) -> None:
    """Find one thing for each of REMOTE, up to the first problem without which the next cannot be looked at."""
    host, _, port_text = silo.coordinator.address.rpartition(":")
    host, port = host.strip("[]"), int(port_text)
    began = time.monotonic()
    try:
        connection = socket.create_connection((host, port), STEP_SECONDS)
    except (OSError, UnicodeError, OverflowError) as error:
        found.problem("connection", *_unreachable(error, silo, host))
        return
    with connection:
        took = time.monotonic() - began
        found.ok("connection", f"{host} port {port} answers, in {1000 * took:.0f} ms")
        if context is None:
            found.skip("certificate", "no TLS, as --insecure-loopback says")
        elif not _check_certificate(found, silo, connection, context, host, port):
            return
    try:
        status, date = _ask(host, port, context, "POST", NOTHING)
        now = datetime.now(UTC)
        hidden = {path: _ask(host, port, context, "GET", path)[0] for path in HIDDEN}
    except (OSError, http.client.HTTPException) as error:
        what = f"does not answer in HTTP: {type(error).__name__} {error}".rstrip()
        found.problem("SuperLink", what, f"{OPERATOR} has to see to it: gramfuse server start")
        return
    if status >= 500:
        what = f"the proxy answers, and nothing behind it (status {status})"
        found.problem("SuperLink", what, f"{OPERATOR} has to start it: gramfuse server start")
    else:
        found.ok("SuperLink", "answers")
    _check_clocks(found, date, now)
    reached = [f"{path} (status {status})" for path, status in hidden.items() if status != 404]
    if reached:
        found.problem(
            "control API",
            f"the coordinator lets this silo reach {', '.join(reached)}: whoever does can start runs, register silos "
            "and take tasks",
            f"{OPERATOR} must let {FLEET} through only, as gramfuse server start does; do not start this silo before",
        )
    else:
        found.ok("control API", "out of this silo's reach")


def _ask(host: str, port: int, context: ssl.SSLContext | None, method: str, path: str) -> tuple[int, str | None]:
    """Send a request without content, and return the status and the Date of the answer."""
    connection = (
        http.client.HTTPConnection(host, port, timeout=STEP_SECONDS)
        if context is None
        else http.client.HTTPSConnection(host, port, timeout=STEP_SECONDS, context=context)
    )
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.headers["Date"]
    finally:
        connection.close()


def _unreachable(error: Exception, silo: Silo, host: str) -> tuple[str, str]:
    """Say why there is no connection, and what to do."""
    if isinstance(error, socket.gaierror):
        what, remedy = f"{host}: no such host: {error.strerror}", f"check 'address' in {silo.path}, and the name server"
    elif isinstance(error, TimeoutError):
        what = f"{host} gave no answer in {STEP_SECONDS:.0f} s"
        remedy = "have the firewalls between let it through, outwards from here"
    elif isinstance(error, ConnectionRefusedError):
        what = f"{silo.coordinator.address} refuses the connection: nothing listens on that port"
        remedy = f"check 'address' in {silo.path}; {OPERATOR} runs: gramfuse server start"
    else:
        what = f"{host}: {getattr(error, 'strerror', None) or error}"
        remedy = f"check 'address' in {silo.path}, and the network"
    if urllib.request.getproxies().get("https") and not urllib.request.proxy_bypass(host):
        remedy += "\n(HTTPS_PROXY is set here; Flower goes through that proxy, and this check does not)"
    return what, remedy


def _check_certificate(
    found: Findings, silo: Silo, connection: socket.socket, context: ssl.SSLContext, host: str, port: int
) -> bool:
    """Return whether TLS can be spoken, by a certificate that is trusted."""
    try:
        with context.wrap_socket(connection, server_hostname=host) as secured:
            leaf = x509.load_der_x509_certificate(secured.getpeercert(True) or b"")
            version = secured.version()
    except ssl.SSLCertVerificationError as error:
        found.problem("certificate", *_untrusted(error, silo, host, port))
        return False
    except OSError as error:
        why = "no TLS is spoken there" if isinstance(error, ssl.SSLError) else "the TLS handshake was not finished"
        remedy = f"check the port of 'address' in {silo.path}; {OPERATOR} has to offer TLS there"
        found.problem("certificate", f"{why}: {getattr(error, 'reason', None) or error}", remedy)
        return False
    left = leaf.not_valid_after_utc - datetime.now(UTC)
    what = f"for {', '.join(_names(leaf))}, until {leaf.not_valid_after_utc:%Y-%m-%d} ({version})"
    renew = f"{left.days} days are left; {OPERATOR} should renew it: gramfuse pki server DIR --renew"
    found.ok("certificate", what, renew if left < EXPIRY_NOTICE else "")
    return True


def _untrusted(error: ssl.SSLCertVerificationError, silo: Silo, host: str, port: int) -> tuple[str, str]:
    """Say what is wrong with a certificate, and what to do."""
    try:  # what it says is only read
        pem = ssl.get_server_certificate((host, port), timeout=STEP_SECONDS)
        leaf = x509.load_pem_x509_certificate(pem.encode("ascii"))
    except (OSError, ValueError):
        return f"is not to be trusted: {error.verify_message}", f"ask {OPERATOR}"
    now, begin, end = datetime.now(UTC), leaf.not_valid_before_utc, leaf.not_valid_after_utc
    renew = f"gramfuse pki server DIR --host {host} --renew"
    if error.verify_code in (EXPIRED, NOT_YET):
        if begin <= now < end:
            return (
                f"the authority that signed it is not valid now, by this machine's clock ({error.verify_message})",
                f"{OPERATOR} has to make a new one: gramfuse pki init; each silo gets its ca.crt",
            )
        return (
            f"is valid from {begin:%Y-%m-%d} to {end:%Y-%m-%d} only, and here it is {now:%Y-%m-%d}",
            f"if the clock here is right, {OPERATOR} has to renew it: {renew}",
        )
    if error.verify_code in (OTHER_HOST, OTHER_ADDRESS):
        return (
            f"is not for {host}; it is for {', '.join(_names(leaf)) or 'nobody'}",
            f"write one of these names as 'address' in {silo.path}, or {OPERATOR} makes one for this name:\n{renew}",
        )
    return (
        f"was not signed by the authority in {silo.ca_path}, but by {leaf.issuer.rfc4514_string()} "
        f"({error.verify_message})",
        f"get ca.crt from {OPERATOR}, and compare its SHA-256 over another way. If they have another one, somebody is "
        "between you and them: do not go on",
    )


def _names(certificate: x509.Certificate) -> list[str]:
    """Return the hosts that a certificate is for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    return [str(name.value) for name in names]


def check_clock(found: Findings, moment: datetime, last: str) -> None:
    """Look at this machine's clock by itself.

    Args:
        last: when the last line of the ledger was written, or empty.
    """
    said = f"{moment:%Y-%m-%d %H:%M:%S %Z}"
    if moment < (datetime.fromisoformat(last) if last else EARLIEST):
        why = "before the last line of the ledger" if last else "before gramfuse was there"
        found.problem("clock", f"it is {said} here, which is {why}", SET_CLOCK)
    else:
        found.ok("clock", said)


def _check_clocks(found: Findings, date: str | None, now: datetime) -> None:
    """Compare this machine's clock with the coordinator's, which told whole seconds a moment ago."""
    subject = REMOTE[3]
    try:
        theirs = parsedate_to_datetime(date or "").astimezone(UTC) + timedelta(seconds=0.5)
    except ValueError:
        found.skip(subject, "the coordinator does not tell its time")
        return
    ahead = now - theirs
    off = f"{abs(ahead).total_seconds():.0f} s {'ahead of' if ahead > timedelta() else 'behind'} the coordinator's"
    if -APART <= ahead <= AHEAD:
        found.ok(subject, f"this clock is {off}" if abs(ahead) > timedelta(seconds=2) else "the same as here")
        return
    found.problem(
        subject,
        f"this clock is {off} ({now:%Y-%m-%d %H:%M:%S} here, {theirs:%Y-%m-%d %H:%M:%S} there, UTC); Flower refuses "
        f"what is signed more than {AHEAD.seconds} s ahead or long ago",
        f"{SET_CLOCK}; if it is the coordinator's that is wrong, tell its operator",
    )

"""Checks a silo's connection to its coordinator: host and port, TLS, the proxy, the SuperLink, and the clock.

It sends none of the silo's data, only a TLS handshake and a few requests without content that change nothing.
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
"""Time limit of one step."""
CONNECTION_SECONDS = 30.0
"""Time limit of all steps together, including name resolution."""

AHEAD = timedelta(seconds=5)
"""Flower refuses signatures from further in the future than this."""
APART = timedelta(seconds=60)
"""Flower refuses signatures older than 300 s; a clock that is off by a fifth of that is not synchronised."""
EARLIEST = datetime(2026, 1, 1, tzinfo=UTC)
"""gramfuse did not exist before this time."""
EXPIRY_NOTICE = timedelta(days=30)

FLEET = "/v1/fleet/"
NOTHING = "/v1/fleet/nothing"
"""A call that Flower does not have: the proxy passes it on, and the SuperLink behind it answers."""
HIDDEN = ("/v1/control/", "/v1/control/start-run", "/v1/runtime/acquire-task")
"""Paths that a silo must not be able to reach. Without a proxy, Flower answers 404 to the first, 405 to the others."""

REMOTE = ("connection", "certificate", "SuperLink", "coordinator's clock", "control API")
"""Subjects of the remote checks, in order."""
OPERATOR = "the coordinator's operator"
EXPIRED, NOT_YET, OTHER_HOST, OTHER_ADDRESS = 10, 9, 62, 64
"""OpenSSL's X509_V_ERR_CERT_HAS_EXPIRED and the like."""
SET_CLOCK = "have this machine's clock synchronised, for instance: timedatectl set-ntp true"


def obstacle(silo: Silo, *, tls: bool) -> str:
    """Return, in one line, the first problem between a silo and its coordinator, and what to do; empty if none.

    Args:
        tls: whether the coordinator uses TLS; False only for one on this machine.
    """
    findings = Findings()
    check_coordinator(findings, silo, tls=tls)
    first = [f"{problem.subject}: {problem.what}; {problem.remedy}" for problem in findings.problems[:1]]
    return " ".join(" ".join(first).split())


def check_coordinator(findings: Findings, silo: Silo, *, tls: bool = True, offline: bool = False) -> None:
    """Check the coordinator: add a finding for each of REMOTE, within CONNECTION_SECONDS even if it does not answer."""
    try:
        address = silo.coordinator.address
    except PlanError as error:
        findings.error("coordinator", error)
        return
    context = _trust(findings, silo) if tls else None
    remote = Findings()
    if not offline and (context is not None or not tls):
        # Name resolution can take longer than any timeout here, so the thread is abandoned after a while.
        thread = threading.Thread(target=_check_remote, args=(remote, silo, context), daemon=True)
        thread.start()
        thread.join(CONNECTION_SECONDS)
        finished, remote = not thread.is_alive(), Findings(remote)
        if not finished and len(remote) < len(REMOTE):
            what = f"{address}: no result within {CONNECTION_SECONDS:.0f} s"
            remedy = f"try again; ask {OPERATOR}, or the network's administrator"
            remote.problem(REMOTE[len(remote)], what, remedy)
    findings.extend(remote)
    for subject in REMOTE[len(remote) :]:
        findings.skip(subject, "skipped by --offline" if offline else "skipped, because an earlier check failed")


def _trust(findings: Findings, silo: Silo) -> ssl.SSLContext | None:
    """Return a TLS context that trusts the same authority that Flower will trust."""
    path, context = silo.ca_path, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cafile=path)
    except OSError as error:  # ssl's errors are among them
        reason = "contains no PEM certificate" if isinstance(error, ssl.SSLError) else error.strerror
        remedy = f"get ca.crt from {OPERATOR}, and compare its SHA-256 over another channel"
        findings.problem("authority", f"{path}: {reason}", remedy)
        return None
    digests = [hashlib.sha256(certificate).digest().hex(":").upper() for certificate in context.get_ca_certs(True)]
    findings.ok("authority", "\n".join([str(path), *(f"SHA-256 {digest}" for digest in digests)]))
    return context


def _check_remote(findings: Findings, silo: Silo, context: ssl.SSLContext | None) -> None:
    """Add a finding for each of REMOTE, up to the first problem that prevents the next check."""
    host, _, port_text = silo.coordinator.address.rpartition(":")
    host, port = host.strip("[]"), int(port_text)
    start = time.monotonic()
    try:
        connection = socket.create_connection((host, port), STEP_SECONDS)
    except (OSError, UnicodeError, OverflowError) as error:
        findings.problem("connection", *_unreachable(error, silo, host))
        return
    with connection:
        seconds = time.monotonic() - start
        findings.ok("connection", f"{host} port {port} answers, in {1000 * seconds:.0f} ms")
        if context is None:
            findings.skip("certificate", "no TLS, because of --insecure-loopback")
        elif not _check_certificate(findings, silo, connection, context, host, port):
            return
    try:
        status, date = _ask(host, port, context, "POST", NOTHING)
        now = datetime.now(UTC)
        hidden = {path: _ask(host, port, context, "GET", path)[0] for path in HIDDEN}
    except (OSError, http.client.HTTPException) as error:
        what = f"does not answer in HTTP: {type(error).__name__} {error}".rstrip()
        findings.problem("SuperLink", what, f"{OPERATOR} must fix it: gramfuse server start")
        return
    if status >= 500:
        what = f"the proxy answers, but the SuperLink behind it does not (status {status})"
        findings.problem("SuperLink", what, f"{OPERATOR} must start it: gramfuse server start")
    else:
        findings.ok("SuperLink", "answers")
    _check_clocks(findings, date, now)
    reached = [f"{path} (status {status})" for path, status in hidden.items() if status != 404]
    if reached:
        findings.problem(
            "control API",
            f"the coordinator lets this silo reach {', '.join(reached)}: anyone who can reach it can start runs, "
            "register silos and take tasks",
            f"{OPERATOR} must expose only {FLEET}, as gramfuse server start does; do not start this silo before",
        )
    else:
        findings.ok("control API", "not reachable by this silo")


def _ask(host: str, port: int, context: ssl.SSLContext | None, method: str, path: str) -> tuple[int, str | None]:
    """Send a request without content, and return the response's status and Date."""
    connection = (
        http.client.HTTPConnection(host, port, timeout=STEP_SECONDS)
        if context is None
        else http.client.HTTPSConnection(host, port, timeout=STEP_SECONDS, context=context)
    )
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.headers["Date"]
    finally:
        connection.close()


def _unreachable(error: Exception, silo: Silo, host: str) -> tuple[str, str]:
    """Return why there is no connection, and what to do."""
    if isinstance(error, socket.gaierror):
        what, remedy = f"{host}: no such host: {error.strerror}", f"check 'address' in {silo.path}, and the name server"
    elif isinstance(error, TimeoutError):
        what = f"{host} gave no answer in {STEP_SECONDS:.0f} s"
        remedy = "let the firewalls on the way allow this outgoing connection"
    elif isinstance(error, ConnectionRefusedError):
        what = f"{silo.coordinator.address} refuses the connection: nothing listens on that port"
        remedy = f"check 'address' in {silo.path}; {OPERATOR} runs: gramfuse server start"
    else:
        what = f"{host}: {getattr(error, 'strerror', None) or error}"
        remedy = f"check 'address' in {silo.path}, and the network"
    if urllib.request.getproxies().get("https") and not urllib.request.proxy_bypass(host):
        remedy += "\n(HTTPS_PROXY is set here; Flower uses that proxy, but this check does not)"
    return what, remedy


def _check_certificate(
    findings: Findings, silo: Silo, connection: socket.socket, context: ssl.SSLContext, host: str, port: int
) -> bool:
    """Return whether a TLS handshake succeeds with a trusted certificate."""
    try:
        with context.wrap_socket(connection, server_hostname=host) as secured:
            leaf = x509.load_der_x509_certificate(secured.getpeercert(True) or b"")
            version = secured.version()
    except ssl.SSLCertVerificationError as error:
        findings.problem("certificate", *_untrusted(error, silo, host, port))
        return False
    except OSError as error:
        reason = "no TLS on that port" if isinstance(error, ssl.SSLError) else "the TLS handshake did not finish"
        remedy = f"check the port of 'address' in {silo.path}; {OPERATOR} must offer TLS there"
        findings.problem("certificate", f"{reason}: {getattr(error, 'reason', None) or error}", remedy)
        return False
    remaining = leaf.not_valid_after_utc - datetime.now(UTC)
    what = f"for {', '.join(_names(leaf))}, until {leaf.not_valid_after_utc:%Y-%m-%d} ({version})"
    renew = f"it expires in {remaining.days} days; {OPERATOR} should renew it: gramfuse pki server DIR --renew"
    findings.ok("certificate", what, renew if remaining < EXPIRY_NOTICE else "")
    return True


def _untrusted(error: ssl.SSLCertVerificationError, silo: Silo, host: str, port: int) -> tuple[str, str]:
    """Return what is wrong with a certificate, and what to do."""
    try:  # this certificate is only inspected, not trusted
        pem = ssl.get_server_certificate((host, port), timeout=STEP_SECONDS)
        leaf = x509.load_pem_x509_certificate(pem.encode("ascii"))
    except (OSError, ValueError):
        return f"is not trusted: {error.verify_message}", f"ask {OPERATOR}"
    now, begin, end = datetime.now(UTC), leaf.not_valid_before_utc, leaf.not_valid_after_utc
    renew = f"gramfuse pki server DIR --host {host} --renew"
    if error.verify_code in (EXPIRED, NOT_YET):
        if begin <= now < end:
            return (
                f"the authority that signed it is not valid now, by this machine's clock ({error.verify_message})",
                f"{OPERATOR} must make a new one: gramfuse pki init; each silo needs its ca.crt",
            )
        return (
            f"is valid only from {begin:%Y-%m-%d} to {end:%Y-%m-%d}, but here it is {now:%Y-%m-%d}",
            f"if the clock here is right, {OPERATOR} must renew it: {renew}",
        )
    if error.verify_code in (OTHER_HOST, OTHER_ADDRESS):
        return (
            f"is not for {host}; it is for {', '.join(_names(leaf)) or 'nobody'}",
            f"use one of these names as 'address' in {silo.path}, or {OPERATOR} makes one for this name:\n{renew}",
        )
    return (
        f"was not signed by the authority in {silo.ca_path}, but by {leaf.issuer.rfc4514_string()} "
        f"({error.verify_message})",
        f"get ca.crt from {OPERATOR}, and compare its SHA-256 over another channel. If theirs differs, someone is "
        "intercepting the connection: do not continue",
    )


def _names(certificate: x509.Certificate) -> list[str]:
    """Return the hosts that a certificate is for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    return [str(name.value) for name in names]


def check_clock(findings: Findings, moment: datetime, last: str) -> None:
    """Check this machine's clock for plausibility.

    Args:
        last: time of the ledger's last line, or empty.
    """
    shown = f"{moment:%Y-%m-%d %H:%M:%S %Z}"
    if moment < (datetime.fromisoformat(last) if last else EARLIEST):
        reason = "before the last line of the ledger" if last else "before gramfuse existed"
        findings.problem("clock", f"it is {shown} here, which is {reason}", SET_CLOCK)
    else:
        findings.ok("clock", shown)


def _check_clocks(findings: Findings, date: str | None, now: datetime) -> None:
    """Compare this machine's clock with the coordinator's Date header, which has whole seconds."""
    subject = REMOTE[3]
    try:
        theirs = parsedate_to_datetime(date or "").astimezone(UTC) + timedelta(seconds=0.5)
    except ValueError:
        findings.skip(subject, "the coordinator does not send its time")
        return
    ahead = now - theirs
    offset = f"{abs(ahead).total_seconds():.0f} s {'ahead of' if ahead > timedelta() else 'behind'} the coordinator's"
    if -APART <= ahead <= AHEAD:
        findings.ok(subject, f"this clock is {offset}" if abs(ahead) > timedelta(seconds=2) else "the same as here")
        return
    findings.problem(
        subject,
        f"this clock is {offset} ({now:%Y-%m-%d %H:%M:%S} here, {theirs:%Y-%m-%d %H:%M:%S} there, UTC); Flower refuses "
        f"signatures more than {AHEAD.seconds} s in the future, or too old",
        f"{SET_CLOCK}; if the coordinator's clock is wrong, tell its operator",
    )

"""The proxy in front of a SuperLink: nginx, which gives silos access to Flower's fleet API and to nothing else.

Flower serves its control and runtime APIs on the same port, open to anyone who can reach it: to push code to all
silos, to register nodes, to take a task. So the SuperLink listens on loopback only, and silos connect to this proxy.
"""

from __future__ import annotations

import grp
import os
import pwd
import shutil
from pathlib import Path

from gramfuse_deployment.endpoint import listening_address
from gramfuse_deployment.processes import CHUNK_BYTES
from gramfuse_protocol.errors import PlanError

BODY_BYTES = CHUNK_BYTES + 2**20
"""Maximum size of a request: Flower splits arrays into chunks, and a header, which it does not split, is small."""
HEADER_SECONDS = 10
"""Time limit of the TLS handshake, and of reading a request's header."""
STALL_SECONDS = 20
"""Longest pause between two reads of a request's body, or two writes of a response. Flower's client waits 30 s."""
ADDRESS_AT_ONCE = 16
"""Concurrent requests from one address: a silo makes up to four, and several silos may share an address."""
ADDRESS_PER_SECOND = 50
"""Request rate of one address; excess requests wait. In full chunks, 250 MB/s: more than a SuperLink can handle."""
ADDRESS_WAITING = 200
"""Waiting requests from one address; nginx refuses any more, and clients repeat them."""
ALL_AT_ONCE = 32
"""Concurrent requests at the SuperLink, from all addresses: this bounds its memory, whoever sends."""

# All paths are relative to the file, so they need no quoting.
# nginx matches the name of a call in the normalised path (decoded, without '..' and doubled slashes) and passes on the
# match only: the SuperLink sees exactly what was checked.
# A SuperLink reads a whole request into memory before it authenticates the sender. So bodies are limited in size, they
# are buffered on disk until complete, and only ALL_AT_ONCE are passed on at a time. Flower's clients repeat requests
# that are refused with 502 or 503.
_CONFIGURATION = """\
daemon off;
{user}worker_processes 1;
worker_rlimit_nofile 8192;
pid nginx.pid;
error_log stderr error;

events {{ worker_connections 2048; }}

http {{
    access_log off;
    server_tokens off;
    client_body_temp_path nginx-body;
    proxy_temp_path nginx-proxy;
    fastcgi_temp_path nginx-fastcgi;
    uwsgi_temp_path nginx-uwsgi;
    scgi_temp_path nginx-scgi;

    limit_conn_zone $binary_remote_addr zone=requests:1m;
    limit_req_zone $binary_remote_addr zone=rate:1m rate={per_second}r/s;

    upstream superlink {{
        server 127.0.0.1:{port} max_conns={all_at_once};
        keepalive 32;
        keepalive_timeout 3s;  # below the SuperLink's 5 s, which would hang up on a request
    }}

    server {{
        listen {listen}{ssl};
        {certificate}
        client_header_timeout {header_seconds}s;
        client_body_timeout {stall_seconds}s;
        send_timeout {stall_seconds}s;
        keepalive_timeout 15s;
        reset_timedout_connection on;
        client_max_body_size {body_bytes};
        client_body_buffer_size 16k;

        location / {{ return 404; }}

        location ~ "^/v1/fleet/(?<call>[a-z-]+)\\z" {{
            limit_except POST {{ deny all; }}
            limit_conn requests {address_at_once};
            limit_req zone=rate burst={waiting};
            proxy_pass http{s}://superlink/v1/fleet/$call;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_request_buffering on;
            proxy_buffering on;
            proxy_read_timeout 60s;
            proxy_send_timeout 60s;
            {trust}
        }}
    }}
}}
"""

_CERTIFICATE = """\
ssl_certificate ../server.crt;
        ssl_certificate_key ../server.key;
        ssl_protocols TLSv1.2 TLSv1.3;"""

_TRUST = """\
proxy_ssl_trusted_certificate ../ca.crt;
            proxy_ssl_verify on;
            proxy_ssl_name localhost;
            proxy_ssl_server_name on;"""


def find_nginx() -> str:
    """Return the path of the nginx binary.

    Raises:
        PlanError: if nginx is not installed.
    """
    path = shutil.which("nginx", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))
    if path is None:
        raise PlanError(
            "nginx is not installed; without it, silos would need access to Flower's own port, which lets anyone "
            "command all silos. Install it (Debian, Ubuntu: apt-get install nginx-light; macOS: brew install nginx)"
        )
    return path


def write_configuration(path: Path, host: str, port: int, superlink: int, *, tls: bool) -> None:
    """Write nginx's configuration.

    Args:
        path: the file; with TLS, the directory above its own holds ca.crt, server.crt and server.key.
        host, port: IP address and port that silos connect to.
        superlink: the SuperLink's port on 127.0.0.1.
        tls: whether nginx and the SuperLink use TLS.

    Raises:
        PlanError: if `host` is not a plain IP address, or a port is out of range.
    """
    listen, _ = listening_address(host, port), listening_address("127.0.0.1", superlink)
    user = ""
    if os.geteuid() == 0:  # by default, root's nginx runs workers as another user, who cannot read this directory
        names = pwd.getpwuid(0).pw_name, grp.getgrgid(os.getegid()).gr_name
        user = f"user {' '.join(map(_quoted, names))};\n"
    path.write_text(
        _CONFIGURATION.format(
            user=user,
            port=superlink,
            listen=listen,
            ssl=" ssl" if tls else "",
            s="s" if tls else "",
            certificate=_CERTIFICATE if tls else "",
            trust=_TRUST if tls else "",
            body_bytes=BODY_BYTES,
            header_seconds=HEADER_SECONDS,
            stall_seconds=STALL_SECONDS,
            address_at_once=ADDRESS_AT_ONCE,
            per_second=ADDRESS_PER_SECOND,
            waiting=ADDRESS_WAITING,
            all_at_once=ALL_AT_ONCE,
        ),
        encoding="utf-8",
    )


def _quoted(name: str) -> str:
    """Quote a name for nginx's configuration."""
    if not name.isprintable():
        raise PlanError(f"nginx's configuration cannot name the user or group {name!r}; start it as another user")
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'

"""The proxy in front of a SuperLink: nginx, which lets silos through to Flower's fleet API and to nothing else.

Flower's control and runtime APIs stand on the same port and are open to whoever reaches it: to push code to all silos,
to register nodes, to take a task. So the SuperLink listens on this machine only, and this is what silos reach.
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
"""Of one request at most. Flower cuts arrays into chunks; what it does not cut, a message's header, is far smaller."""
HEADER_SECONDS = 10
"""For the TLS handshake and for all of a request's header, each."""
STALL_SECONDS = 20
"""Between two pieces of a body, or of an answer that is being read. Flower's own client gives up after 30."""
ADDRESS_AT_ONCE = 16
"""Requests of one address that are under way at once: a silo has up to four, and several may share an address."""
ADDRESS_PER_SECOND = 50
"""Requests of one address; what is above waits. With full chunks that is 250 MB/s, more than a SuperLink can take."""
ADDRESS_WAITING = 200
"""Requests of one address that may wait for their turn; beyond that they are refused, to be repeated."""
ALL_AT_ONCE = 32
"""Requests that the SuperLink has at once, of all addresses: what bounds its memory, whoever sends."""

# All paths are relative to the file, so that they need no quoting.
# The name of a call is matched as nginx understands the path (decoded, without '..' and doubled slashes), and only the
# match is passed on: what was checked is what the SuperLink sees.
# A SuperLink has all of a request in memory before it looks at who sent it. So a body is small, it waits on the disk
# until it is complete, and only so many are passed on at once. Flower's clients repeat what is refused with 502 or 503.
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
    """Return the path of nginx.

    Raises:
        PlanError: if there is none.
    """
    path = shutil.which("nginx", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))
    if path is None:
        raise PlanError(
            "nginx is not installed, and without it Flower's own port, which anybody may command, would have to be "
            "open to silos; install it (Debian, Ubuntu: apt-get install nginx-light; macOS: brew install nginx)"
        )
    return path


def write_configuration(path: Path, host: str, port: int, superlink: int, *, tls: bool) -> None:
    """Write nginx's configuration.

    Args:
        path: in a directory of a directory with ca.crt, server.crt and server.key.
        host, port: IP address and port that silos come in by.
        superlink: the SuperLink's port, on 127.0.0.1.
        tls: whether both of them speak TLS.

    Raises:
        PlanError: if `host` is no plain IP address, or a port is out of range.
    """
    listen, _ = listening_address(host, port), listening_address("127.0.0.1", superlink)
    user = ""
    if os.geteuid() == 0:  # otherwise nginx would take another user, who may not read here
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
    """Return a name as one word of nginx's configuration."""
    if not name.isprintable():
        raise PlanError(f"the user or group {name!r} has a name that nginx cannot be given; start it as another one")
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'

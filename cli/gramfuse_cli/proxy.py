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

from gramfuse_protocol.errors import PlanError

MOST_MEGABYTES = 64
"""Of one request. Flower sends arrays in chunks of 5 MiB; what it does not cut is far smaller than this."""

# All paths are relative to the file, so that they need no quoting.
# The name of a call is matched as nginx understands the path (decoded, without '..' and doubled slashes), and only the
# match is passed on: what was checked is what the SuperLink sees.
# Time-outs are about progress: so long without a byte. An answer may take its time, a large message any time.
_CONFIGURATION = """\
daemon off;
{user}worker_processes 1;
pid nginx.pid;
error_log stderr warn;

events {{ worker_connections 1024; }}

http {{
    access_log off;
    server_tokens off;
    client_body_temp_path nginx-body;
    proxy_temp_path nginx-proxy;
    fastcgi_temp_path nginx-fastcgi;
    uwsgi_temp_path nginx-uwsgi;
    scgi_temp_path nginx-scgi;

    upstream superlink {{
        server 127.0.0.1:{port};
        keepalive 32;
        keepalive_timeout 3s;  # below the SuperLink's 5 s, which would hang up on a request
    }}

    server {{
        listen {listen}{ssl};
        {certificate}
        client_max_body_size {megabytes}m;
        client_body_timeout 120s;
        send_timeout 120s;

        location / {{ return 404; }}

        location ~ "^/v1/fleet/(?<call>[a-z-]+)\\z" {{
            limit_except POST {{ deny all; }}
            proxy_pass http{s}://superlink/v1/fleet/$call;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_request_buffering off;
            proxy_buffering off;
            proxy_read_timeout 600s;
            proxy_send_timeout 120s;
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


def write_configuration(path: Path, listen: str, port: int, *, tls: bool) -> None:
    """Write nginx's configuration.

    Args:
        path: in a directory of a directory with ca.crt, server.crt and server.key.
        listen: `host:port` that silos dial.
        port: the SuperLink's, on 127.0.0.1.
        tls: whether both of them speak TLS.
    """
    user = ""
    if os.geteuid() == 0:  # otherwise nginx would take another user, who may not read here
        user = f"user {pwd.getpwuid(0).pw_name} {grp.getgrgid(os.getegid()).gr_name};\n"
    path.write_text(
        _CONFIGURATION.format(
            user=user,
            port=port,
            listen=listen,
            ssl=" ssl" if tls else "",
            s="s" if tls else "",
            certificate=_CERTIFICATE if tls else "",
            trust=_TRUST if tls else "",
            megabytes=MOST_MEGABYTES,
        ),
        encoding="utf-8",
    )

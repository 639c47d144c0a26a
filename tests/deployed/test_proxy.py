"""What a silo can reach of the coordinator: Flower's fleet API, and nothing else. The rest is there, a door further."""

from __future__ import annotations

import grp
import http.client
import os
import ssl
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.supercore.runtime import RuntimeHttpClient
from httpx import HTTPStatusError

from gramfuse_cli.commands.run import run
from gramfuse_cli.commands.server import server
from gramfuse_deployment.endpoint import free_port
from gramfuse_deployment.nginx import BODY_BYTES, find_nginx, write_configuration
from gramfuse_deployment.processes import BIN
from gramfuse_deployment.superlink import Link
from gramfuse_protocol.contract import node_key
from gramfuse_protocol.errors import FederationError, PlanError

FORBIDDEN = sorted(
    path for method, path in PROTOBUF_REQUEST_TYPES if method == "POST" and not path.startswith("/v1/fleet/")
)


def ask(deployment: Any, port: int, path: str, method: str = "POST", body: bytes = b"") -> tuple[int, bytes]:
    """Send a request for exactly this path, by TLS; return the status and the answer."""
    context = ssl.create_default_context(cafile=deployment.ca)
    connection = http.client.HTTPSConnection("localhost", port, context=context, timeout=20)
    try:
        connection.request(method, path, body, {"content-type": PROTOBUF_MEDIA_TYPE, "accept": PROTOBUF_MEDIA_TYPE})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_a_silos_own_calls_pass(coordinator: Any) -> None:
    # The SuperLink itself answers: it wants a node's signature.
    for port in (coordinator.port, coordinator.server_port()):
        status, answer = ask(coordinator, port, "/v1/fleet/pull-messages")
        assert (status, b"SuperNode authentication" in answer) == (401, True)


def test_no_call_of_the_control_and_runtime_apis_passes(coordinator: Any) -> None:
    assert {"/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/acquire-task"} <= set(FORBIDDEN)
    for path in FORBIDDEN:
        assert ask(coordinator, coordinator.port, path)[0] == 404, path
    # They are there, and most ask for nothing: the SuperLink's own port lists the nodes for anybody.
    for path in ("/v1/control/list-nodes", "/v1/control/list-runs", "/v1/control/list-federations"):
        assert ask(coordinator, coordinator.server_port(), path)[0] == 200, path


@pytest.mark.parametrize(
    "path",
    [
        "/v1/fleet/../control/list-nodes",
        "/v1/fleet/%2e%2e/control/list-nodes",
        "/v1/fleet/%2e%2e%2fcontrol%2flist-nodes",
        "/v1/fleet/..%2fcontrol/list-nodes",
        "/v1/fleet/..%5ccontrol/list-nodes",
        "/v1/fleet/..;/control/list-nodes",
        "/v1/fleet/./../control/list-nodes",
        "/v1/fleet/x/../../control/list-nodes",
        "/v1/fleet//../control/list-nodes",
        "/v1/control/list-nodes?/v1/fleet/pull-messages",
        "/v1/control/list-nodes#/v1/fleet/pull-messages",
        "/v1/control/list-nodes%3f/../../fleet/pull-messages",
        "/v1/control/list-nodes%23/../../fleet/x/y",
        "//v1/control/list-nodes",
        "/v1//control/list-nodes",
        "/%76%31/control/list-nodes",
        "/V1/control/list-nodes",
        "https://localhost/v1/control/list-nodes",
        "v1/control/list-nodes",
        "/v1/fleet",
        "/v1/fleet/",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/pull-messages%0a",
        "/v1/fleet/pull-messages%20HTTP/1.1%0d%0aHost:x%0d%0a%0d%0aPOST%20/v1/control/list-nodes",
        "/health",
        "/docs",
        "/openapi.json",
        "/",
    ],
)
def test_no_other_way_to_write_a_path_passes(coordinator: Any, path: str) -> None:
    status, answer = ask(coordinator, coordinator.port, path)
    assert status in (400, 401, 404), (status, answer)
    # 401 is the fleet API, for a path that means it in the end.
    assert status != 401 or "/fleet/pull-messages" in path, path


def test_only_posts_of_a_bounded_size_pass(coordinator: Any) -> None:
    for method in ("GET", "PUT", "DELETE", "OPTIONS", "PROPFIND"):
        assert ask(coordinator, coordinator.port, "/v1/fleet/pull-messages", method)[0] == 403, method
    for size, status in ((BODY_BYTES, 400), (BODY_BYTES + 1, 413)):  # the SuperLink finds that zeros are no message
        assert ask(coordinator, coordinator.port, "/v1/fleet/push-object", body=bytes(size))[0] == status


HOSTS = [
    "::1%x]:1; } include /etc/passwd; server { listen [::1",  # Python takes any text for the scope of an address
    "fe80::1%eth0",
    "127.0.0.1; access_log /tmp/x",
    "127.0.0.1:80",
    "127.0.0.1\n",
    "127.0.0.1 ssl",
    "{",
    "localhost",
    "unix:/tmp/x",
    "",
]


@pytest.mark.parametrize("host", HOSTS)
def test_a_host_that_would_be_a_directive_of_nginx_is_refused(host: str, tmp_path: Path) -> None:
    path = tmp_path / "nginx.conf"
    with pytest.raises(PlanError):
        write_configuration(path, host, 9443, 8000, tls=True)
    for command, arguments in ((server, ["start", str(tmp_path)]), (run, [str(tmp_path), str(tmp_path), "--serve"])):
        result = CliRunner().invoke(command, [*arguments, "--host", host])
        assert (result.exit_code, "--host" in result.output) == (2, True), result.output
    assert not path.exists()


@pytest.mark.parametrize(("port", "superlink"), [(0, 8000), (65536, 8000), (-1, 8000), (9443, 0), (9443, 65536)])
def test_a_port_that_is_none_is_refused(port: int, superlink: int, tmp_path: Path) -> None:
    with pytest.raises(PlanError):
        write_configuration(tmp_path / "nginx.conf", "127.0.0.1", port, superlink, tls=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::", "::1"])
def test_nginx_reads_the_configuration_for_every_kind_of_address(host: str, tmp_path: Path) -> None:
    directory = tmp_path / "with 'quotes\"; and a brace {"
    directory.mkdir()
    write_configuration(directory / "nginx.conf", host, free_port(), 8000, tls=False)
    done = subprocess.run(
        [find_nginx(), "-t", "-q", "-e", "stderr", "-p", f"{directory}/", "-c", "nginx.conf"], capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("group", ['x"; worker_processes 9; #', "domain users", "a\\", "a{b}"])
def test_a_group_with_an_odd_name_is_one_word_of_nginxs(
    group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(grp, "getgrgid", lambda _: SimpleNamespace(gr_name=group))
    write_configuration(tmp_path / "nginx.conf", "127.0.0.1", 9443, 8000, tls=False)
    done = subprocess.run(
        [find_nginx(), "-t", "-e", "stderr", "-p", f"{tmp_path}/", "-c", "nginx.conf"], capture_output=True, text=True
    )
    # It looks for that very group, and finds none; nothing else of the line is taken for anything.
    assert f'getgrnam("{group}") failed' in done.stderr or "ignored" in done.stderr, done.stderr
    monkeypatch.setattr(grp, "getgrgid", lambda _: SimpleNamespace(gr_name="a\nb"))
    with pytest.raises(PlanError):
        write_configuration(tmp_path / "nginx.conf", "127.0.0.1", 9443, 8000, tls=False)


def test_a_silo_cannot_register_a_node_or_push_a_run(coordinator: Any, tmp_path: Path) -> None:
    key = node_key.generate()[1]
    own = Link.of_server(coordinator.coordinator)
    public = Link("", own.home, "server", f"localhost:{coordinator.port}", False, str(coordinator.ca))
    with pytest.raises(FederationError, match="404 Not Found"):
        public.register("mallory", key)
    with pytest.raises(FederationError, match="404 Not Found"):
        public.nodes()
    own.register("mallory", key)
    assert [node.name for node in own.nodes()] == ["mallory"]

    app = tmp_path / "app"
    app.mkdir()
    (app / "evil.py").write_text("app = None\n")
    (app / "pyproject.toml").write_text(
        '[project]\nname = "evil"\nversion = "1.0.0"\ndescription = ""\nlicense = "Apache-2.0"\n[tool.flwr.app]\n'
        'publisher = "mallory"\n[tool.flwr.app.components]\nserverapp = "evil:app"\nclientapp = "evil:app"\n'
    )
    (tmp_path / "key.pub").write_text(key)
    (tmp_path / "config.toml").write_text(
        f'[superlink.public]\naddress = "localhost:{coordinator.port}"\nroot-certificates = "{coordinator.ca}"\n'
        f'[superlink.own]\naddress = "{own.address}"\nroot-certificates = "{coordinator.ca}"\n'
    )
    for command in (["run", app], ["supernode", "register", tmp_path / "key.pub"]):
        for link in ("public", "own"):
            done = subprocess.run(
                [str(BIN / "flwr"), *map(str, command), link, "--format", "json"],
                env={**os.environ, "FLWR_HOME": str(tmp_path)},
                capture_output=True,
                text=True,
            )
            said = done.stdout + done.stderr
            if link == "public":
                assert "404" in said
                assert '"success": true' not in said
            elif command[0] == "run":
                assert '"success": true' in said, said
            else:
                assert "already in use" in said, said


def test_a_task_cannot_be_taken(coordinator: Any) -> None:
    def take(port: int, *interceptors: Any) -> Any:
        client = RuntimeHttpClient.from_server_address(
            server_address=f"localhost:{port}",
            insecure=False,
            root_certificates=coordinator.ca.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec"), *interceptors],
        )
        with client:
            return client.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-serverapp"]))

    with pytest.raises(HTTPStatusError, match="404"):
        take(coordinator.port)
    # On the coordinator's own machine the call is there, but for whoever knows the SuperExec's secret.
    with pytest.raises(HTTPStatusError, match="401"):
        take(coordinator.server_port())
    secret = (coordinator.coordinator / "superlink" / "secret").read_bytes()
    methods = frozenset({"/flwr.proto.Runtime/AcquireTask"})
    take(coordinator.server_port(), SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=methods))

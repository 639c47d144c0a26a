"""What a silo can reach of the coordinator: Flower's fleet API, and nothing else. The rest is there, a door further."""

from __future__ import annotations

import http.client
import os
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.supercore.runtime import RuntimeHttpClient
from httpx import HTTPStatusError

from gramfuse_cli.link import Link
from gramfuse_cli.processes import BIN
from gramfuse_protocol import node_key
from gramfuse_protocol.errors import FederationError

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
    for size, status in ((60, 400), (65, 413)):  # the SuperLink itself finds that zeros are no message
        assert ask(coordinator, coordinator.port, "/v1/fleet/push-object", body=bytes(size * 2**20))[0] == status


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

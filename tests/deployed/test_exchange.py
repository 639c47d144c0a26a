"""From certificates to a merged model, by the commands that the coordinator's and the silos' operators type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.timeout(240)
def test_three_silos_and_a_coordinator_merge(deploy: Callable[..., Any], pico_project: Callable[..., Any]) -> None:
    project = pico_project(silos=3)
    deployment = deploy(project)
    server = deployment.start_server()
    silos = [deployment.start_silo(name, "--once", connected=False) for name in project.names]
    report = deployment.run()
    assert [silo["name"] for silo in report["silos"]] == list(project.names)
    for silo in silos:
        assert silo.process.wait(60) == 0, silo.said
        assert not silo.processes()
        print(silo.said)
    assert server.process.poll() is None
    print(server.said)

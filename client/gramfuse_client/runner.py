"""A silo's SuperExec: Flower's own, changed to start only `gramfuse_client.worker`, and to start it fast.

Flower's SuperExec runs a new command for each message, which imports Flower, torch and transformers again. That takes
seconds per phase, and on a slow disk longer than the 30 s after which Flower abandons a task. This one forks each
worker from a process that has imported them already (multiprocessing's forkserver), and refuses other kinds of task. It
passes a task's token through a pipe, because other users can read command lines.
"""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing import forkserver

from flwr.supercore.cli import flower_superexec
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec import run_superexec
from flwr.supercore.superexec.executor import SubprocessExecutor
from flwr.supercore.superexec.executor.types import ExecutionSpec, LaunchResult

from gramfuse_client import worker

PRELOADED = ["gramfuse_client.worker", "gramfuse_model.loading.base_model"]
"""Modules that import Flower, torch and transformers. None that reads data: pyarrow starts a thread, and it is not safe
to fork a process with threads."""


class ForkingExecutor(SubprocessExecutor):
    """Forks a worker for each ClientApp task, and fails every other task."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Start the worker of one task."""
        if spec.task_type != TaskType.CLIENT_APP:
            return LaunchResult.failed(f"a silo runs no {spec.task_type}: refused")
        arguments = ["--runtime-api-address", spec.runtime_api_address, "--token", spec.token]
        arguments += ["--parent-pid", str(spec.parent_pid)]
        arguments += ["--insecure"] if spec.insecure else []
        # A daemon process is terminated when the SuperExec exits.
        self._context.Process(target=_work, args=(arguments,), daemon=True).start()
        return LaunchResult.accepted()

    def reconcile(self) -> None:
        """Reap ended workers. Flower calls this several times a second."""
        multiprocessing.active_children()


def _work(arguments: list[str]) -> None:
    sys.argv = [TaskType.CLIENT_APP, *arguments]
    worker.main()


def main() -> None:
    """Run a SuperExec, as `flower-superexec` does."""
    worker.check_flower()
    executor = ForkingExecutor()
    run_superexec.get_executor = lambda *_, **__: executor
    flower_superexec()


if __name__ == "__main__":
    main()

"""A silo's SuperExec: Flower's own, but all that it starts is `gramfuse_client.worker`, and it starts it fast.

Flower's SuperExec runs a command for each message, which loads Flower, torch and transformers anew: seconds for each
phase, and on a slow disk more than the 30 s after which Flower gives a task up. This one forks each worker off a
process that has them loaded (a forkserver of Python's multiprocessing), and takes no other kind of task. A task's token
is handed over by a pipe, not on a command line that others can read.
"""

from __future__ import annotations

import importlib
import multiprocessing
import sys
from multiprocessing import forkserver

from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor import SubprocessExecutor
from flwr.supercore.superexec.executor.types import ExecutionSpec, LaunchResult

from gramfuse_client import worker

# Flower's packages re-export functions under their modules' names, so the module is named in full.
command = importlib.import_module("flwr.supercore.cli.flower_superexec")

PRELOADED = ["gramfuse_client.worker", "gramfuse_model.loading.base_model"]
"""What loads Flower, and what loads torch and transformers. Not what reads data: pyarrow starts a thread, and a process
with threads that are not made for it must not be forked."""


class ForkingExecutor(SubprocessExecutor):
    """Starts a worker for each task that is a silo's, and fails every other task."""

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
        # A daemon: it is told to end when the SuperExec ends.
        self._context.Process(target=_work, args=(arguments,), daemon=True).start()
        return LaunchResult.accepted()

    def reconcile(self) -> None:
        """Let go of the workers that have ended; Flower calls this several times a second."""
        multiprocessing.active_children()


def _work(arguments: list[str]) -> None:
    sys.argv = [TaskType.CLIENT_APP, *arguments]
    worker.main()


def main() -> None:
    """Run a SuperExec, as `flower-superexec` does."""
    worker.check_flower()
    executor = ForkingExecutor()
    worker.superexec.get_executor = lambda *_, **__: executor
    command.flower_superexec()


if __name__ == "__main__":
    main()

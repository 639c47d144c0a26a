"""Bad days: a silo's disk that is full, a line that is slow, a clock that is wrong."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertModel

from gramfuse_client.guard.ledger import Ledger
from gramfuse_client.silo_file import Silo
from gramfuse_protocol.contract.layout import Layout

Run = Callable[..., Any]


def wider(pico_bert: Path, directory: Path, **sizes: int) -> Path:
    """Write a BERT of other sizes, with the tokenizer of the pico one."""
    shutil.copytree(pico_bert, directory)
    BertModel(BertConfig.from_pretrained(pico_bert, **sizes)).save_pretrained(directory)
    return directory


class Disk:
    """A small file system."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,mode=700", "tmpfs", str(path)])
        if done.returncode:
            pytest.skip("a file system of its own for a silo's state takes the right to mount one")

    def fill(self, left: int = 0) -> None:
        """Leave so many bytes free."""
        with (self.path / "filler").open("wb", buffering=0) as filler:
            filler.write(bytes(shutil.disk_usage(self.path).free - left))

    def make_room(self) -> None:
        """Free what was filled."""
        (self.path / "filler").unlink()

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)


@pytest.fixture
def disk() -> Iterator[Callable[[Path], Disk]]:
    """Return a function that mounts a small file system; to be asked for before `deploy`, which ends what writes."""
    made: list[Disk] = []

    def make(path: Path) -> Disk:
        made.append(Disk(path))
        return made[-1]

    yield make
    for disk in made:
        disk.unmount()


def refusals(project: Any, name: str) -> list[tuple[str, str]]:
    """(phase, reason) of each refusal in a silo's ledger."""
    entries = [line.entry for line in Ledger(Silo.read(project.silo(name)).ledger, name).lines()]
    return [(entry.phase, entry.note) for entry in entries if entry.kind == "refusal"]


@pytest.mark.timeout(900)
def test_a_silo_without_room_for_its_statistics_is_left_out(
    disk: Run, deploy: Run, pico_project: Run, pico_bert: Path, tmp_path: Path, undisturbed: Run
) -> None:
    base = wider(pico_bert, tmp_path / "base", hidden_size=64, intermediate_size=128)
    project = pico_project(silos=4, secure=True, base=base)
    project.replace(project.plan, 'metrics = "sum"', 'metrics = "none"')
    small = disk(project.directory / "state" / "silo-d")
    deployment = deploy(project)
    deployment.start_server()
    deployment.register()
    silos = {name: deployment.start_silo(name) for name in project.names}
    running = deployment.start_run()
    running.wait_for("from", "silo-d", "join")
    small.fill(left=2**18)
    report = running.report()
    (lost,) = report["lost"]
    assert lost["name"] == "silo-d"
    assert "no space left" in lost["reason"]
    assert running.weights() == undisturbed(project, *project.names[:3])
    assert [(phase, said.partition(":")[0]) for phase, said in refusals(project, "silo-d")] == [
        ("train", "RefusalError")
    ]
    assert "no space left" in silos["silo-d"].said
    assert not (deployment.state("silo-d") / "statistics.safetensors").exists()
    deployment.check_silos()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_silo_that_cannot_write_its_ledger_sends_nothing_until_it_can(
    disk: Run, deploy: Run, pico_project: Run, undisturbed: Run
) -> None:
    project = pico_project(silos=3, secure=True)
    project.replace(project.plan, 'metrics = "sum"', 'metrics = "none"')
    small = disk(project.directory / "state" / "silo-c")
    deployment = deploy(project)
    deployment.start_server()
    deployment.register()
    silos = {name: deployment.start_silo(name) for name in project.names}
    running = deployment.start_run()
    running.wait_for("from", "silo-c", "keys")
    trained = deployment.trained()
    small.fill()
    code, error = running.end()
    assert code == 16
    for words in ("'silo-c'", "this silo cannot write its ledger, so nothing leaves", f"--resume {running.out}"):
        assert words in error["message"]
    assert ("from", "silo-c", "shares") not in running.crossed()
    small.make_room()
    silos["silo-c"].wait_for("No space left on device")

    running = deployment.resume()
    assert running.report()["lost"] == []
    assert deployment.trained() == trained
    assert running.weights() == undisturbed(project)
    deployment.check_silos()


class Throttle:
    """Lets so many bytes a second through, of all connections together."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.free = 0.0

    async def pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(2**14):
                now = time.monotonic()
                self.free = max(now, self.free) + len(data) / self.rate
                await asyncio.sleep(self.free - now)
                sink.write(data)
                await sink.drain()
        except OSError:
            pass
        finally:
            sink.close()


@contextmanager
def slow_line(to: int, rate: float) -> Iterator[int]:
    """Yield a port that leads to another one, slowly, both ways."""
    loop = asyncio.new_event_loop()
    up, down = Throttle(rate), Throttle(rate)

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", to)
        await asyncio.gather(up.pump(reader, back), down.pump(there, writer))

    server = loop.run_until_complete(asyncio.start_server(carry, "127.0.0.1", 0, limit=2**14))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_line_of_2_megabytes_a_second_carries_200_megabytes(
    deploy: Run, pico_project: Run, pico_bert: Path, tmp_path: Path, undisturbed: Run
) -> None:
    base = wider(pico_bert, tmp_path / "base", hidden_size=1152, intermediate_size=2304, num_hidden_layers=1)
    project = pico_project(silos=3, secure=True, base=base)
    project.replace(project.plan, 'metrics = "sum"', 'metrics = "none"')
    deployment = deploy(project)
    assert Layout.read(project.directory / "layout.json").sum_entries * 8 >= 200_000_000
    deployment.start_server()
    deployment.register()
    with slow_line(deployment.port, 2e6) as port:
        project.replace(project.silo("silo-c"), f"localhost:{deployment.port}", f"localhost:{port}")
        for name in project.names:
            deployment.start_silo(name)
        running = deployment.start_run()
        report = running.report(700)
        assert report["lost"] == []
        assert report["seconds"]["masked"] > 100
        assert running.weights() == undisturbed(project)
        deployment.check_silos()
        deployment.stop()


@pytest.mark.timeout(900)
def test_a_clock_that_is_ahead_is_named_and_once_it_is_right_the_silo_connects(
    deploy: Run, pico_project: Run, tmp_path: Path
) -> None:
    deployment = deploy(pico_project(silos=2))
    deployment.start_server()
    deployment.register()
    clock = tmp_path / "ahead"
    deployment.change("CLOCK", str(clock))
    clock.write_text("3")
    silo = deployment.start_silo("silo-a")
    assert silo.stop() == 0

    clock.write_text("60")
    silo = deployment.start_silo("silo-a", connected=False)
    said = silo.wait_for("coordinator's clock: this clock is ")
    assert "s ahead of" in said
    assert "timedatectl" in said
    assert "connected to" not in said
    clock.write_text("0")
    silo.wait_for("connected to", seconds=90)

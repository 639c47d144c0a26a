"""Compares peak memory of the ServerApp with two and eight silos: it must not grow with the number of silos.

    python benchmarks/memory.py

Runs real processes on loopback: a SuperLink, N SuperNodes, one `gramfuse run` of MiniLM (77 MB from each silo). Silos
have few messages and train for one epoch, since only the size of their contributions matters. The peak is the kernel's
high-water mark (VmHWM) of the ServerApp's process. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil

from loopback import BIN, CONNECTION, deployment


def main() -> None:
    """Measure and print a Markdown table; exit status 1 if memory grows by more than a quarter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--silos", type=int, nargs=2, default=[2, 8])
    few, many = parser.parse_args().silos
    peaks = {silos: peak(silos) for silos in (few, many)}
    print("| silos | peak of the ServerApp | statistics received |\n|---|---|---|")
    for silos, (memory, received) in peaks.items():
        print(f"| {silos} | {memory / 1e6:.0f} MB | {received / 1e6:.0f} MB |")
    ratio = peaks[many][0] / peaks[few][0]
    print(f"\n{many} silos take {ratio:.3f} times the memory of {few} silos (limit: 1.25).")
    raise SystemExit(ratio > 1.25)


def peak(silos: int) -> tuple[int, int]:
    """Return the ServerApp's peak resident memory and the received bytes of statistics, for one run."""
    with tempfile.TemporaryDirectory(prefix="gramfuse-") as scratch:
        project = make_project(Path(scratch) / "project", silos)
        with deployment(Path(scratch) / "deployment", sorted((project / "silos").iterdir())) as home:
            watch = Watch()
            command = [str(BIN / "gramfuse"), "run", str(project), CONNECTION, "--out", f"{scratch}/run", "--json"]
            environment = {**os.environ, "FLWR_HOME": str(home)}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            memory = watch.stop()
    received: dict[str, dict[str, int]] = json.loads(done.stdout)["bytes"]
    return memory, sum(phases["upload"] for phases in received.values())


def make_project(directory: Path, silos: int) -> Path:
    """Write a locked project whose silos share the demo's four data sets."""
    subprocess.run([str(BIN / "gramfuse"), "init", str(directory)], check=True, capture_output=True)
    names = [path.stem for path in sorted((directory / "silos").iterdir())]
    plan = (directory / "plan.toml").read_text(encoding="utf-8").partition("[[silo]]")[0]
    plan = plan.replace("epochs = 5", "epochs = 1").replace('metrics = "sum"', 'metrics = "none"')
    plan = plan.replace("secure-aggregation = true", "secure-aggregation = false")  # which needs at least four silos
    roster = []
    for n in range(silos):
        house = names[n % len(names)]
        rows = (directory / "data" / house / "train.jsonl").read_text(encoding="utf-8").splitlines()[:32]
        folder = directory / "data" / f"silo-{n}"
        folder.mkdir()
        for part in ("train", "held-out"):
            (folder / f"{part}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        text = (directory / "silos" / f"{names[0]}.toml").read_text(encoding="utf-8")
        text = text.replace(names[0], f"silo-{n}").replace("minimum-examples = 100", "minimum-examples = 1")
        text = text.replace("open-uploads = false", "open-uploads = true")
        (directory / "silos" / f"silo-{n}.toml").write_text(text, encoding="utf-8")
        roster.append(f'\n[[silo]]\nname = "silo-{n}"\n')
    for name in names:
        (directory / "silos" / f"{name}.toml").unlink()
    (directory / "plan.toml").write_text(plan + "".join(roster), encoding="utf-8")
    locked = subprocess.run(
        [str(BIN / "gramfuse"), "plan", "lock", str(directory), "--json"], check=True, stdout=subprocess.PIPE
    )
    digest = json.loads(locked.stdout)["plan_digest"]
    for path in (directory / "silos").iterdir():
        text = path.read_text(encoding="utf-8").replace("approved = []", f'approved = ["{digest}"]')
        path.write_text(text, encoding="utf-8")
    return directory


class Watch:
    """Tracks the peak memory of flwr-serverapp processes until stopped."""

    def __init__(self) -> None:
        self.peak = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Stop watching and return the peak in bytes."""
        self._stopped.set()
        self._thread.join()
        return self.peak

    def _follow(self) -> None:
        while not self._stopped.wait(0.2):
            for process in psutil.process_iter(["cmdline"]):
                if any("flwr-serverapp" in part for part in process.info["cmdline"] or ()):
                    self.peak = max(self.peak, high_water(process.pid))


def high_water(pid: int) -> int:
    """Return the high-water mark of a process's resident memory, in bytes; 0 if it has exited."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    fields: dict[str, Any] = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return int(fields.get("VmHWM", "0 kB").split()[0]) * 1024


if __name__ == "__main__":
    main()

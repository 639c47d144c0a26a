"""Measures peak memory of silos and coordinator for adapters on one layer as wide as those of an 8-billion model.

    python benchmarks/wide_adapters.py
    python benchmarks/wide_adapters.py --rank 32 --precision bfloat16

Runs real processes on loopback: a SuperLink, two SuperNodes, one `gramfuse run` in open mode. The base is a Llama
of one layer with the widths of Llama 3 8B (4,096 wide, 14,336 in the feed-forward layer, 8 of 32 heads for keys) and
random weights, and a tokenizer of bytes. Peaks are the kernel's high-water marks (VmHWM). Linux only; needs 8 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loopback import BIN, CONNECTION, deployment
from memory import high_water

WORDS = ("rain", "snow", "cat", "horse", "pan", "spoon", "the", "of")
SPECIAL = ["<pad>", "<s>", "</s>"]
ROWS = 64
"""Prompts of a silo."""


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="of the base at silos")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gramfuse-") as scratch:
        place = Path(scratch)
        parameters = make_base(place / "base", options.layers, options.width)
        project = make_project(place / "project", options.rank, options.precision)
        with deployment(place / "deployment", sorted((project / "silos").iterdir())) as home:
            watch, began = Peaks(), time.monotonic()
            command = [str(BIN / "gramfuse"), "run", str(project), CONNECTION, "--out", f"{scratch}/run", "--json"]
            environment = {**os.environ, "FLWR_HOME": str(home)}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            peaks, seconds = watch.stop(), time.monotonic() - began
        adapter = (place / "run" / "adapter" / "adapter_model.safetensors").stat().st_size
    sent: Mapping[str, Mapping[str, int]] = json.loads(done.stdout)["bytes"]
    upload = max(phases["upload"] for phases in sent.values())
    print("| base | rank | base at silos | peak of a silo | peak of the coordinator | sent by a silo | adapter | run |")
    print("|---|---|---|---|---|---|---|---|")
    print(
        f"| {parameters / 1e6:.0f} million parameters, {4 * parameters / 1e9:.2f} GB | {options.rank} | "
        f"{options.precision} | {peaks['flwr-clientapp'] / 1e9:.2f} GB | {peaks['flwr-serverapp'] / 1e9:.2f} GB | "
        f"{upload / 1e6:.1f} MB | {adapter / 1e6:.1f} MB | {seconds:.0f} s |"
    )


def make_base(directory: Path, layers: int, width: int) -> int:
    """Write a Llama with random weights and its tokenizer; return its number of parameters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate([*SPECIAL, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=len(wrapped),
        hidden_size=width,
        intermediate_size=14336 * width // 4096,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        num_key_value_heads=max(1, width // 512),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(1)
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def make_project(directory: Path, rank: int, precision: str) -> Path:
    """Write a locked project of two silos, each with prompts of its own."""
    rng = random.Random(1)
    (directory / "silos").mkdir(parents=True)
    names = ("north", "south")
    roster = "".join(f'[[silo]]\nname = "{name}"\n' for name in names)
    (directory / "plan.toml").write_text(
        '[plan]\nname = "wide"\n[model]\nbase = "../base"\ntask = "prompt-completion"\nmax-length = 64\n'
        "target-length = 8\n[training]\nepochs = 1\nbatch-size = 8\nlearning-rate = 1e-4\nfreeze = []\n"
        f'[training.lora]\nrank = {rank}\n[privacy]\nsecure-aggregation = false\nmetrics = "none"\n{roster}',
        encoding="utf-8",
    )
    for name in names:
        rows = [{"text": " ".join(rng.choices(WORDS, k=12)), "label": rng.choice(WORDS)} for _ in range(ROWS)]
        data = directory / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    locked = subprocess.run(
        [str(BIN / "gramfuse"), "plan", "lock", str(directory), "--json"], check=True, stdout=subprocess.PIPE
    )
    digest = json.loads(locked.stdout)["plan_digest"]
    for name in names:
        (directory / "silos" / f"{name}.toml").write_text(
            f'name = "{name}"\nbase = "../../base"\ndevice = "cpu"\nthreads = 1\napproved = ["{digest}"]\n'
            f'[data]\ntrain = "../{name}.jsonl"\nheld-out = 0.5\n[memory]\nbase = "{precision}"\ncheckpointing = true\n'
            '[limits]\nminimum-examples = 1\nopen-uploads = true\nmetrics = "silo"\n',
            encoding="utf-8",
        )
    return directory


class Peaks:
    """Tracks the peak memory of Flower's app processes, by the name of their command, until stopped."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {"flwr-clientapp": 0, "flwr-serverapp": 0}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def stop(self) -> Mapping[str, int]:
        """Stop watching and return the peaks in bytes."""
        self._stopped.set()
        self._thread.join()
        return self.peaks

    def _follow(self) -> None:
        while not self._stopped.wait(0.1):
            for process in psutil.process_iter(["cmdline"]):
                line: Any = process.info["cmdline"] or ()
                for name in self.peaks:
                    if any(name in part for part in line):
                        self.peaks[name] = max(self.peaks[name], high_water(process.pid))


if __name__ == "__main__":
    main()

"""Projects that tests write, and their silos in this process: as `gramfuse simulate` has both, without Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from transformers import BertConfig

from gramfuse_client.app import SiloApp
from gramfuse_client.exchange.local_model import Workbench
from gramfuse_client.silo_file import write_identity
from gramfuse_client.state.state import State
from gramfuse_model.project import Project
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.secure_sum.keys import Identity
from gramfuse_server.app import coordinate
from gramfuse_server.report.schema import Report
from gramfuse_simulation.engine import laboratory_of, simulated_silo, study_of
from tests.conftest import write_jsonl


def bert_config(vocab_size: int, **changes: Any) -> BertConfig:
    """A BERT of two layers, 16 features wide, but for what is changed."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    still = {"max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertConfig(vocab_size=vocab_size, **{**sizes, **still, **changes})


def write_project(
    directory: Path, plan: str, silos: Mapping[str, tuple[str, list[Any], list[Any]]], limits: str = ""
) -> Path:
    """Write a project of silos that let everything leave.

    Args:
        plan: text of the plan up to the roster.
        silos: by name, what the silo's entry in the roster says, its training and its held-out rows.
        limits: more lines of each silo file's [limits].
    """
    (directory / "silos").mkdir(parents=True)
    roster = ""
    for name, (entry, train, held_out) in silos.items():
        write_jsonl(directory / f"{name}-train.jsonl", train)
        write_jsonl(directory / f"{name}-held-out.jsonl", held_out)
        (directory / "silos" / f"{name}.toml").write_text(
            f'name = "{name}"\ndevice = "cpu"\nthreads = 1\n[data]\ntrain = "../{name}-train.jsonl"\n'
            f'held-out = "../{name}-held-out.jsonl"\n[limits]\nminimum-examples = 10\nopen-uploads = true\n'
            f'metrics = "silo"\n{limits}'
        )
        roster += f'[[silo]]\nname = "{name}"\n{entry}\n'
    (directory / "plan.toml").write_text(plan + roster)
    return directory


class Simulated:
    """A project's locked plan, and its silos with their state under a place.

    Args:
        settings: of the plan, as `--set` takes them.
        identities: whether silos get keys of their own, which the plan then names.
        tuned: whether a part of the training data is kept for validation.
    """

    def __init__(
        self, directory: Path, place: Path, *settings: str, identities: bool = False, tuned: bool = False
    ) -> None:
        self.directory = directory
        self.place = place
        self.state = place / "state"
        self.plan, self.layout = Project.read(directory, settings).locked()
        if identities:
            self.plan = self._with_keys()
        self.files = {name: str(directory / "silos" / f"{name}.toml") for name in self.plan.names}
        self.silos = {
            name: simulated_silo(file, str(self.state), self.plan.digest, tuned=tuned)
            for name, file in self.files.items()
        }

    def _with_keys(self) -> Plan:
        identities = {name: Identity(bytes([number] * 32)) for number, name in enumerate(self.plan.names, 1)}
        for name, identity in identities.items():
            write_identity(self.state / name / "identity.pem", identity)
        return self.plan.with_keys({name: identity.public.hex() for name, identity in identities.items()})

    @property
    def apps(self) -> dict[str, SiloApp]:
        return {name: SiloApp(lambda _, silo=silo: silo) for name, silo in self.silos.items()}

    @property
    def out(self) -> Path:
        return self.place / "run"

    def _spec(self, **more: Any) -> dict[str, Any]:
        files = list(self.files.values())
        return {"silos": files, "state": str(self.state), "directory": str(self.directory), "tune": None, **more}

    def laboratory(self, **more: Any) -> Callable[..., Any]:
        """What a simulation has silos' own models measured with."""
        return partial(laboratory_of, self._spec(**more), self.plan, self.layout)

    def study(self, **more: Any) -> Any:
        """What a simulation compares and tunes a merge with."""
        return study_of(self._spec(**more), self.plan, self.layout)

    def finish(self, name: str, arrays: Any, to: Path) -> None:
        """Make a silo's whole model of the merged body and its own head, as coordinate's `own_heads`."""
        silo = self.silos[name]
        Workbench(silo, self.plan).finish(self.layout, arrays, State(silo.state, self.plan.digest), to)

    def run(self, grid: Callable[[dict[str, SiloApp]], Any], **more: Any) -> Report:
        """Run the whole exchange; the run directory is `out`."""
        return coordinate(grid(self.apps), self.plan, self.layout, self.directory, self.out, **more)

"""The silo file: what a silo contributes and what it allows. Private to the silo."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from datetime import time
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from gramfuse_client.data.setting_names import FILE_SETTINGS, SettingNames
from gramfuse_protocol.contract.node_key import public_of
from gramfuse_protocol.contract.plan_sections import ContextFree, Experts, Name, Sha256
from gramfuse_protocol.documents import Section, parse, read_text
from gramfuse_protocol.errors import PlanError
from gramfuse_protocol.files import open_private
from gramfuse_protocol.secure_sum.keys import Identity
from gramfuse_protocol.text import Legible


def _source_or_fraction(value: str | float) -> str | float:
    if not isinstance(value, str) and not 0 < value < 1:
        raise ValueError(f"expected a fraction between 0 and 1 (got {value})")
    return value


class Data(Section):
    """`[data]`: where the examples are, and which columns to use.

    A source is a path to a file, or `hf:<hub id or folder>[:config][#split]` (`gramfuse_client.data.formats`). The
    plan's task determines what a column must contain (`gramfuse_client.data.examples`).
    """

    train: Annotated[str, Field(min_length=1)]
    held_out: Annotated[str | float, AfterValidator(_source_or_fraction)]
    """A source, or the fraction of `train` that is set aside."""
    validation: Annotated[str | float, AfterValidator(_source_or_fraction)] | None = None
    """Validation examples for `gramfuse tune`: a source, or the fraction of the held-out examples that is set aside.

    Metrics never include examples that are set aside.
    """
    split_seed: int = 0
    text: str = "text"
    """Column of the text, or for `token-classification` of the words."""
    text_pair: str | None = None
    """Column of a pair's second text."""
    image: str = "image"
    """Column of the image for `image-classification`: its bytes, or its path relative to the source."""
    label: str = "label"
    """Column of the label, labels, number, tags or target text; `causal-lm` uses none."""
    skip_bad: Annotated[int, Field(ge=0)] = 0
    """Bad rows of each source to leave out; more than that are an error."""


class Hours(Legible):
    """A period of the day, by the silo's own clock. It can include midnight."""

    model_config = ConfigDict(frozen=True)

    start: time
    end: time

    def __contains__(self, moment: time) -> bool:
        if self.start <= self.end:
            return self.start <= moment < self.end
        return moment >= self.start or moment < self.end

    def __str__(self) -> str:
        return f"{self.start:%H:%M}-{self.end:%H:%M}"

    @staticmethod
    def parse(text: object) -> object:
        """Parse `HH:MM-HH:MM`; raises ValueError."""
        moment = r"([01][0-9]|2[0-3]):[0-5][0-9]"
        if not isinstance(text, str) or not re.fullmatch(f"{moment}-{moment}", text):
            raise ValueError(f"expected hours such as 20:00-06:00 (got {text!r})")
        start, end = text.split("-")
        if start == end:
            raise ValueError(f"{text} is an empty period; leave the key out to train at any hour")
        return Hours(start=time.fromisoformat(start), end=time.fromisoformat(end))


class Limits(Section):
    """`[limits]`: what this silo allows at most; it refuses more."""

    minimum_examples: Annotated[int, Field(ge=1)] = 100
    minimum_label_examples: Annotated[int, Field(ge=1)] = 2
    """Least training examples of a label for which they are in the sums that a head is fitted from; with
    `multi-label`, the least that do not have it, too.

    For a label that only this silo has, the sum is this silo's own: the features of a single example, for instance.
    """
    open_uploads: bool = False
    """Whether this silo may send its own statistics unmasked."""
    metrics: Literal["none", "sum", "silo"] = "sum"
    """The most that this silo sends of its held-out metrics."""
    exact_metrics: bool = False
    """Whether held-out counts may be in a secure sum without noise (a plan with privacy.metrics-epsilon = "none").

    Then a coordinator that sends two crafted models learns single held-out examples from the difference of their sums.
    """
    context_free: ContextFree = "mean"
    """The most that a secure plan may ask for (`merge.context-free`) from layers that see tokens without context.

    Under `full`, and often under `diagonal`, the sum reveals which words occur in the silos' data, and how often.
    """
    experts: Experts = "mean"
    """The most that a secure plan may ask for (`merge.experts`) from the experts of a mixture.

    Under `full`, if only this silo uses an expert, the sum of that expert's Gram matrices is this silo's own.
    """
    maximum_bytes: Annotated[int, Field(ge=1)] | None = None
    """Maximum size of one contribution; None means as much as the plan asks for."""
    repeat_contributions: bool = False
    """Whether this silo may repeat its contribution under a plan, in another session of the same plan."""
    differing_survivors: bool = False
    """Whether sums that share some of this silo's rows may differ by a few silos, or by how the plan reads the rows.

    Anyone who has both sums can subtract them. The difference is the contribution of the silos by which they differ, or
    of the silos whose rows are read differently; if that is only this silo, it is its own statistics.
    """
    train_hours: Annotated[Hours, BeforeValidator(Hours.parse)] | None = None
    """When this silo trains and measures, for instance 20:00-06:00; None means at any hour."""


def _check_port(address: str) -> str:
    if int(address.rpartition(":")[2]) > 65535:
        raise ValueError("its port is above 65535")
    return address


class Coordinator(Section):
    """`[coordinator]`: where the coordinator is, and how the two authenticate each other."""

    address: Annotated[
        str,
        Field(pattern=r"^(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9][A-Za-z0-9.-]*):[1-9][0-9]{0,4}$"),
        AfterValidator(_check_port),
    ]
    """host:port of its proxy."""
    ca: str = "ca.crt"
    """PEM file of the authority that signed the coordinator's certificate."""
    node_key: str | None = None
    """The private key that authenticates this silo's connection; the plan's roster has the public key.

    None means north.key beside a silo file north.toml.
    """


class Memory(Section):
    """`[memory]`: how a silo fine-tunes in less memory. The plan stays as it is, and so does what is computed, but for
    rounding."""

    batch: Annotated[int, Field(ge=0)] = 0
    """Most examples of a batch that the model sees at once; 0 for the plan's whole batch. It must divide the plan's
    `training.batch-size`. Gradients of the parts are added up."""
    checkpointing: bool = False
    """Whether activations are computed a second time for the gradients, instead of being kept."""
    base: Literal["float32", "bfloat16"] = "float32"
    """Precision of the frozen weights, under a plan with adapters."""


class SiloFile(Section):
    """A whole silo file. Paths are relative to the file's directory.

    Default file names are derived from the silo file's name, so two silo files in one directory share nothing.
    """

    kind = "a silo file"

    name: Name
    identity: str | None = None
    """The silo's Ed25519 private key, made by `gramfuse silo keygen`; the plan's roster has the public key.

    None means north.pem beside a silo file north.toml.
    """
    state: str | None = None
    """Directory for state that must survive a restart. It holds fine-tuned weights, so keep it private.

    None means north.state beside a silo file north.toml.
    """
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads; 0 means torch's own choice. The last bits of floating-point sums depend on it."""
    base: str | None = None
    """Where this silo keeps the base model, if not where the plan says."""
    approved: tuple[Sha256, ...] = ()
    """Digests of the plans that this silo takes part in."""
    data: Data
    memory: Memory = Memory()
    limits: Limits = Limits()
    coordinator: Coordinator | None = None
    """Needed by `gramfuse silo start`."""


def read_silos(project: Path, names: Iterable[str]) -> dict[str, Silo]:
    """Read the silo files of a project's silos, `silos/<name>.toml`.

    Args:
        project: directory of the plan.

    Raises:
        PlanError: if a file is missing, or belongs to another silo.
    """
    silos = {}
    for name in names:
        path = project / "silos" / f"{name}.toml"
        silo = Silo.read(path)
        if silo.name != name:
            raise PlanError(f"{path}: 'name' is {silo.name!r}; expected {name!r}, the file's name")
        silos[name] = silo
    return silos


def write_identity(path: Path, identity: Identity) -> None:
    """Write a private key to a new file that only its owner can read.

    Raises:
        PlanError: if the file exists already, or cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = open_private(path, os.O_EXCL)
    except FileExistsError:
        raise PlanError(
            f"{path} exists already; plans name the key, so it is not replaced. Move it away first"
        ) from None
    except OSError as error:
        raise PlanError(f"{path}: cannot be made: {error}") from None
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(identity.to_pem())


class Silo:
    """A silo file, and the directory that its paths are relative to.

    Args:
        project: directory of the plan file, which paths in the plan are relative to. Set in a simulation, and for a
            silo without a network, which has the plan as a file; None over the network.
        words: names of settings in errors about data.
    """

    def __init__(
        self, path: Path, file: SiloFile, project: Path | None = None, words: SettingNames = FILE_SETTINGS
    ) -> None:
        self.path = path
        self.file = file
        self.directory = path.parent.resolve()
        self.project = project
        self.words = words

    @staticmethod
    def read(path: Path) -> Silo:
        """Read `silo.toml`; raises PlanError naming the file and the key."""
        return Silo(path, parse(SiloFile, read_text(path), str(path)))

    @property
    def name(self) -> str:
        """The silo's name in the roster."""
        return self.file.name

    @property
    def base(self) -> str | None:
        """Where this silo keeps the base model, or None; a directory as a full path."""
        if self.file.base is None:
            return None
        path = self.directory / Path(self.file.base).expanduser()
        return str(path) if path.is_dir() or self.file.base.startswith(".") else self.file.base

    @property
    def identity_path(self) -> Path:
        """Path of the silo's private key."""
        return self._path_of(self.file.identity, ".pem").resolve()

    def identity(self) -> Identity:
        """Read the silo's private key.

        Raises:
            PlanError: if it is missing or invalid, or others on this machine can read it.
        """
        return Identity.parse(self._secret(self.identity_path), str(self.identity_path))

    @property
    def coordinator(self) -> Coordinator:
        """The `[coordinator]` section.

        Raises:
            PlanError: if the file has none.
        """
        if self.file.coordinator is None:
            raise PlanError(
                f'{self.path}: has no [coordinator]; write\n[coordinator]\naddress = "HOST:PORT"\nca = "ca.crt"'
            )
        return self.file.coordinator

    @property
    def node_key_path(self) -> Path:
        """Path of the private key that authenticates this silo's connection."""
        return self._path_of(self.file.coordinator.node_key if self.file.coordinator else None, ".key").resolve()

    def node_key(self) -> str:
        """Return the public key line of the node key.

        Raises:
            PlanError: if the private key is missing or invalid, or others on this machine can read it.
        """
        return public_of(self._secret(self.node_key_path), str(self.node_key_path))

    @property
    def ca_path(self) -> Path:
        """Path of the certificate of the authority that signed the coordinator's certificate."""
        return (self.directory / self.coordinator.ca).resolve()

    @property
    def ledger(self) -> Path:
        """Path of the ledger, which records everything that the silo sends."""
        return self.state / "ledger.jsonl"

    def _secret(self, path: Path) -> str:
        """Return the text of a file; raise PlanError if it is missing or others can read it."""
        try:
            mode = path.stat().st_mode
        except OSError:
            raise PlanError(
                f"{path}: no such file; make this silo's keys with: gramfuse silo keygen {self.path}"
            ) from None
        if mode & 0o077:
            raise PlanError(f"{path}: others on this machine can read it; run: chmod 600 {path}")
        return read_text(path)

    @property
    def state(self) -> Path:
        """Directory for state that must survive a restart."""
        return self._path_of(self.file.state, ".state")

    def _path_of(self, name: str | None, suffix: str) -> Path:
        """Return the path that the silo file names; by default, the silo file's own name with another suffix."""
        return self.directory / (f"{self.path.stem}{suffix}" if name is None else name)

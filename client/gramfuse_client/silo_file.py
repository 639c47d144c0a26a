"""The silo file: what a silo brings and what it allows. Private to the silo."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from datetime import time
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from gramfuse_client.data.setting_names import OF_FILES, SettingNames
from gramfuse_protocol.contract.node_key import public_of
from gramfuse_protocol.contract.plan_sections import ContextFree, Experts, Name, Sha256
from gramfuse_protocol.documents import Section, parse, read_text
from gramfuse_protocol.errors import PlanError
from gramfuse_protocol.files import open_private
from gramfuse_protocol.secure_sum.keys import Identity
from gramfuse_protocol.text import Legible


def _source_or_fraction(value: str | float) -> str | float:
    if not isinstance(value, str) and not 0 < value < 1:
        raise ValueError(f"a fraction lies between 0 and 1 (got {value})")
    return value


class Data(Section):
    """`[data]`: where the examples are and which columns count.

    A source is a path to a .jsonl, .ndjson, .json, .csv or .tsv file, packed with gzip or not, or to a .parquet file;
    or it is `hf:<hub id or folder>[:config][#split]` (`gramfuse_client.data.formats`). What a column must hold depends
    on the plan's task (`gramfuse_client.data.examples`).
    """

    train: Annotated[str, Field(min_length=1)]
    held_out: Annotated[str | float, AfterValidator(_source_or_fraction)]
    """A source, or the fraction of `train` that is set aside."""
    validation: Annotated[str | float, AfterValidator(_source_or_fraction)] | None = None
    """What `gramfuse tune` chooses by: a source, or the fraction of the held-out examples that is set aside for it.

    Metrics are never of examples that are set aside.
    """
    split_seed: int = 0
    text: str = "text"
    """Text, or for `token-classification` words."""
    text_pair: str | None = None
    """The second text of a pair."""
    image: str = "image"
    """For `image-classification`: an image, or its path from where the source is."""
    label: str = "label"
    """Label, labels, number, tags or target text; `causal-lm` has none."""
    skip_bad: Annotated[int, Field(ge=0)] = 0
    """So many rows of each source may be bad, and are left out; more are an error."""


class Hours(Legible):
    """A stretch of the day, by the silo's own clock; it may go over midnight."""

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
            raise ValueError(f"{text} is no time at all; leave the key out to train at any hour")
        return Hours(start=time.fromisoformat(start), end=time.fromisoformat(end))


class Limits(Section):
    """`[limits]`: what this silo refuses."""

    minimum_examples: Annotated[int, Field(ge=1)] = 100
    open_uploads: bool = False
    """Whether this silo's own statistics may leave it unmasked."""
    metrics: Literal["none", "sum", "silo"] = "sum"
    """The most that may leave of its held-out metrics."""
    exact_metrics: bool = False
    """Whether held-out counts may be in a secure sum without noise (a plan with privacy.metrics-epsilon = "none").

    Then a coordinator that sends two crafted models learns single held-out examples from the difference of their sums.
    """
    context_free: ContextFree = "mean"
    """The most that a secure plan may ask for (`merge.context-free`) of layers that see tokens without context.

    From the sum of what leaves under `full`, and often under `diagonal`, it can be told which words occur in the silos'
    data, and how often.
    """
    experts: Experts = "mean"
    """The most that a secure plan may ask for (`merge.experts`) of the experts of a mixture.

    Under `full`, the sum of the Gram matrices of an expert that only this silo uses is this silo's own.
    """
    maximum_bytes: Annotated[int, Field(ge=1)] | None = None
    """The most that one contribution may have; None is as much as the plan asks for."""
    repeat_contributions: bool = False
    """Whether what was contributed under a plan may be contributed again, in another session of the same plan."""
    differing_survivors: bool = False
    """Whether sums over some of the same rows may differ by a few silos, or by how the plan reads the rows.

    Whoever reads both sums can subtract them: what is left is the part of the silos in which they differ, or of those
    whose rows are read in another way, and if that is this silo alone, its own statistics.
    """
    train_hours: Annotated[Hours, BeforeValidator(Hours.parse)] | None = None
    """When this silo trains and measures, for instance 20:00-06:00; None is at any hour."""


def _port(address: str) -> str:
    """Refuse a port that there is not."""
    if int(address.rpartition(":")[2]) > 65535:
        raise ValueError("its port is above 65535")
    return address


class Coordinator(Section):
    """`[coordinator]`: where the coordinator is, and how each knows the other."""

    address: Annotated[
        str, Field(pattern=r"^(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9][A-Za-z0-9.-]*):[1-9][0-9]{0,4}$"), AfterValidator(_port)
    ]
    """host:port of its proxy."""
    ca: str = "ca.crt"
    """PEM file with the certificate authority that signed the coordinator's certificate."""
    node_key: str | None = None
    """The key that this silo's connection is authenticated with; its public half is in the plan's roster.

    None is north.key beside a silo file north.toml.
    """


class SiloFile(Section):
    """A whole silo file. Relative paths start at the directory that the file lies in.

    What is the silo's own is named after the file by default, so that two silo files in one directory share nothing.
    """

    name: Name
    identity: str | None = None
    """The silo's Ed25519 private key, made by `gramfuse silo keygen`; its public half is in the plan's roster.

    None is north.pem beside a silo file north.toml.
    """
    state: str | None = None
    """Directory for what must survive a restart; it holds fine-tuned weights, so keep it private.

    None is north.state beside a silo file north.toml.
    """
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads; 0 takes what torch finds. Floating-point sums depend on it in their last bits."""
    base: str | None = None
    """Where this silo keeps the base model, if not where the plan says."""
    approved: tuple[Sha256, ...] = ()
    """Digests of the plans that this silo takes part in."""
    data: Data
    limits: Limits = Limits()
    coordinator: Coordinator | None = None
    """Needed by `gramfuse silo start`."""


def read_silos(project: Path, names: Iterable[str]) -> dict[str, Silo]:
    """Read the silo files of a project's silos, `silos/<name>.toml`.

    Args:
        project: directory of the plan.

    Raises:
        PlanError: if one is missing, or is another silo's.
    """
    silos = {}
    for name in names:
        path = project / "silos" / f"{name}.toml"
        silo = Silo.read(path)
        if silo.name != name:
            raise PlanError(f"{path}: 'name' is {silo.name!r}; expected {name!r}, as the file is called")
        silos[name] = silo
    return silos


def write_identity(path: Path, identity: Identity) -> None:
    """Write a private key to a new file that only its owner can read.

    Raises:
        PlanError: if the file is there already, or cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = open_private(path, os.O_EXCL)
    except FileExistsError:
        raise PlanError(
            f"{path} exists already; a silo keeps its key, since plans name it. Move it away first"
        ) from None
    except OSError as error:
        raise PlanError(f"{path}: cannot be made: {error}") from None
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(identity.to_pem())


class Silo:
    """A silo file and the directory that its paths start at.

    Args:
        project: directory of the plan file, where a path in the plan starts: in a simulation, and where a silo without
            a network has the plan as a file. Over the network there is none.
        words: what errors of data call settings.
    """

    def __init__(self, path: Path, file: SiloFile, project: Path | None = None, words: SettingNames = OF_FILES) -> None:
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
        """Where this silo keeps the base model, if its file says so; a directory in full."""
        if self.file.base is None:
            return None
        path = self.directory / Path(self.file.base).expanduser()
        return str(path) if path.is_dir() or self.file.base.startswith(".") else self.file.base

    @property
    def identity_path(self) -> Path:
        """Where the silo's private key is."""
        return self._own(self.file.identity, ".pem").resolve()

    def identity(self) -> Identity:
        """Read the silo's private key.

        Raises:
            PlanError: if it is not there, is no such key, or others on this machine can read it.
        """
        return Identity.parse(self._secret(self.identity_path), str(self.identity_path))

    @property
    def coordinator(self) -> Coordinator:
        """Where the coordinator is.

        Raises:
            PlanError: if the file does not say.
        """
        if self.file.coordinator is None:
            raise PlanError(
                f'{self.path}: has no [coordinator]; write\n[coordinator]\naddress = "HOST:PORT"\nca = "ca.crt"'
            )
        return self.file.coordinator

    @property
    def node_key_path(self) -> Path:
        """Where the key of this silo's connection is."""
        return self._own(self.file.coordinator.node_key if self.file.coordinator else None, ".key").resolve()

    def node_key(self) -> str:
        """Return the public half of the key that this silo's connection is authenticated with.

        Raises:
            PlanError: if it is not there, is no such key, or others on this machine can read it.
        """
        return public_of(self._secret(self.node_key_path), str(self.node_key_path))

    @property
    def ca_path(self) -> Path:
        """Where the certificate authority is that signed the coordinator's certificate."""
        return (self.directory / self.coordinator.ca).resolve()

    @property
    def ledger(self) -> Path:
        """Where everything that leaves is written down."""
        return self.state / "ledger.jsonl"

    def _secret(self, path: Path) -> str:
        """Return the text of a file that only its owner may read."""
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
        """Directory for what must survive a restart."""
        return self._own(self.file.state, ".state")

    def _own(self, name: str | None, suffix: str) -> Path:
        """Return the path that the silo file names, or else the one called as the silo file is, with the suffix."""
        return self.directory / (f"{self.path.stem}{suffix}" if name is None else name)

"""The silo file: what a silo brings and what it allows. Private to the silo."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from gramfuse_client.private import open_private
from gramfuse_protocol.documents import Section, parse, read_text
from gramfuse_protocol.errors import PlanError
from gramfuse_protocol.keys import Identity
from gramfuse_protocol.plan import Name, Sha256


def _source_or_fraction(value: str | float) -> str | float:
    if not isinstance(value, str) and not 0 < value < 1:
        raise ValueError(f"a fraction lies between 0 and 1 (got {value})")
    return value


class Data(Section):
    """`[data]`: where the examples are and which columns count.

    A source is a path to a .jsonl, .jsonl.gz, .csv or .parquet file, or `hf:<hub id or folder>[#split]`.
    """

    train: Annotated[str, Field(min_length=1)]
    held_out: Annotated[str | float, AfterValidator(_source_or_fraction)]
    """A source, or the fraction of `train` that is set aside."""
    split_seed: int = 0
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"


class Limits(Section):
    """`[limits]`: what this silo refuses."""

    minimum_examples: Annotated[int, Field(ge=1)] = 100
    open_uploads: bool = False
    """Whether this silo's own statistics may leave it unmasked."""
    metrics: Literal["none", "sum", "silo"] = "sum"
    """The most that may leave of its held-out metrics."""


class SiloFile(Section):
    """A whole silo file. Relative paths start at the directory that the file lies in."""

    name: Name
    identity: str = "identity.pem"
    """The silo's Ed25519 private key, made by `gramfuse silo keygen`; its public half is in the plan's roster."""
    state: str = "state"
    """Directory for what must survive a restart; it holds fine-tuned weights, so keep it private."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads; 0 takes what torch finds. Floating-point sums depend on it in their last bits."""
    base: str | None = None
    """Where this silo keeps the base model, if not where the plan says."""
    approved: tuple[Sha256, ...] = ()
    """Digests of the plans that this silo takes part in."""
    data: Data
    limits: Limits = Limits()


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
    """A silo file and the directory that its paths start at."""

    def __init__(self, path: Path, file: SiloFile) -> None:
        self.path = path
        self.file = file
        self.directory = path.parent.resolve()

    @staticmethod
    def read(path: Path) -> Silo:
        """Read `silo.toml`; raises PlanError naming the file and the key."""
        return Silo(path, parse(SiloFile, read_text(path), str(path)))

    @property
    def name(self) -> str:
        """The silo's name in the roster."""
        return self.file.name

    @property
    def identity_path(self) -> Path:
        """Where the silo's private key is."""
        return (self.directory / self.file.identity).resolve()

    def identity(self) -> Identity:
        """Read the silo's private key.

        Raises:
            PlanError: if it is not there, is no such key, or others on this machine can read it.
        """
        path = self.identity_path
        try:
            mode = path.stat().st_mode
        except OSError:
            raise PlanError(
                f"{path}: no such file; make this silo's key with: gramfuse silo keygen {self.path}"
            ) from None
        if mode & 0o077:
            raise PlanError(f"{path}: others on this machine can read it; run: chmod 600 {path}")
        return Identity.parse(read_text(path), str(path))

    @property
    def state(self) -> Path:
        """Directory for what must survive a restart."""
        return self.directory / self.file.state

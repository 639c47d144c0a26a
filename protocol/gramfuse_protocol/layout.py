"""The layout: the ordered list of blocks that every contribution consists of.

It is derived once from the base model and the plan (`gramfuse_model.tracing`), travels as JSON, and its
digest is in the locked plan, so that both sides agree on names, shapes and order before anything is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from gramfuse_protocol.canonical import canonical_json, digest
from gramfuse_protocol.documents import read_text
from gramfuse_protocol.errors import PlanError
from gramfuse_protocol.structure import Blocks, parse_structure

ITEM_BYTES = 4
"""Statistics travel as little-endian float32."""

PIECE_BYTES = 128 * 2**20
"""Most bytes of statistics in one piece."""

Positive = Annotated[int, Field(ge=1, le=2**53 - 1)]

EXPONENT = 40
Exponent = Annotated[int, Field(ge=-EXPONENT, le=EXPONENT)]
"""Of two, of a feature's amplitude."""


def _structure(text: str) -> str:
    parse_structure(text)
    return text


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Linear(_Frozen):
    """A weight that is merged in closed form.

    torch's `nn.Linear` stores it transposed, (d_out, d_in); transformers' `Conv1D` stores (d_in, d_out).
    """

    weight: str
    d_out: Positive
    transposed: bool


class Group(_Frozen):
    """Linear weights whose modules receive the identical tensor, and so share one Gram matrix."""

    name: str
    d_in: Positive
    structure: Annotated[str, AfterValidator(_structure)]
    weights: Annotated[tuple[Linear, ...], Field(min_length=1)]
    exponents: tuple[Exponent, ...] = ()
    """For each feature, the power of two that its root mean square on public text stays below; for secure sums."""

    @model_validator(mode="after")
    def _one_exponent_for_each_feature(self) -> Group:
        if len(self.exponents) not in (0, self.d_in):
            raise ValueError(f"group {self.name!r} has {len(self.exponents)} exponents for {self.d_in} features")
        return self

    @cached_property
    def blocks(self) -> Blocks:
        """The blocks of this group's Gram matrix."""
        return Blocks.of(self.structure, self.d_in)

    @property
    def d_out(self) -> int:
        """Outputs of all its weights together."""
        return sum(weight.d_out for weight in self.weights)


class Tensor(_Frozen):
    """A trainable parameter of the base model."""

    name: str
    shape: tuple[Positive, ...]
    merge: Literal["regmean", "mean"]


class Block(NamedTuple):
    """One array of a contribution: `gram:<group>` is a packed Gram matrix, `delta:<parameter>` a weight difference."""

    name: str
    shape: tuple[int, ...]

    @property
    def entries(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Slice(NamedTuple):
    """The flattened elements [start, stop) of a block, as they travel in one piece."""

    block: Block
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Key of this slice on the wire."""
        whole = self.start == 0 and self.stop == self.block.entries
        return self.block.name if whole else f"{self.block.name}[{self.start}:{self.stop}]"


class Layout(_Frozen):
    """Groups and tensors of one plan over one base model.

    Args:
        groups: in the order in which the base model runs them.
        tensors: every trainable parameter, in the order of the base model.
        frozen: parameters that stay as they are; they never leave a silo.
    """

    version: Literal[1] = 1
    groups: tuple[Group, ...]
    tensors: Annotated[tuple[Tensor, ...], Field(min_length=1)]
    frozen: tuple[str, ...]

    @model_validator(mode="after")
    def _holds_together(self) -> Layout:
        for kind, names in (("group", [g.name for g in self.groups]), ("tensor", [t.name for t in self.tensors])):
            if len(set(names)) != len(names):
                raise ValueError(f"a {kind} name comes twice")
        merged = {tensor.name: tensor.shape for tensor in self.tensors if tensor.merge == "regmean"}
        expected = {}
        for group, linear in self.linear():
            if linear.weight in expected:
                raise ValueError(f"weight {linear.weight!r} is in two groups")
            shape = (linear.d_out, group.d_in)
            expected[linear.weight] = shape if linear.transposed else shape[::-1]
        if merged != expected:
            raise ValueError("groups and tensors do not fit together")
        return self

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical form."""
        return digest(self.model_dump(mode="json"))

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks of a contribution in order: each group's Gram matrix, then each tensor's difference."""
        grams = tuple(Block(gram_block(group.name), (group.blocks.entries,)) for group in self.groups)
        return grams + tuple(Block(delta_block(tensor.name), tensor.shape) for tensor in self.tensors)

    @cached_property
    def sums(self) -> tuple[Block, ...]:
        """All blocks of what is summed over silos, in order (`gramfuse_model.summands`).

        `count`: weight c, examples, and token rows of each group. `s:<group>`: packed c·Ĝ. `t:<group>`: c·Ĝ·Δ, (d_in,
        d_out), weights side by side. `m:<parameter>`: c·Δ, in the parameter's own shape.
        """
        count = Block("count", (2 + len(self.groups),))
        s = tuple(Block(f"s:{group.name}", (group.blocks.entries,)) for group in self.groups)
        t = tuple(Block(f"t:{group.name}", (group.d_in, group.d_out)) for group in self.groups)
        m = tuple(Block(f"m:{tensor.name}", tensor.shape) for tensor in self.tensors)
        return (count, *s, *t, *m)

    @cached_property
    def sum_entries(self) -> int:
        """Number of elements of what is summed over silos."""
        return sum(block.entries for block in self.sums)

    @property
    def deltas(self) -> tuple[Slice, ...]:
        """The blocks that a whole model is sent as: each tensor's difference from the base."""
        return tuple(Slice(block, 0, block.entries) for block in self.blocks[len(self.groups) :])

    @property
    def contribution_bytes(self) -> int:
        """Bytes of one silo's contribution, without the few hundred bytes of its headers."""
        return ITEM_BYTES * sum(block.entries for block in self.blocks)

    def upload_bytes(self, *, masked: bool) -> int:
        """Bytes of one silo's contribution as it leaves: as words of a secure sum, or in the clear."""
        return 8 * self.sum_entries if masked else self.contribution_bytes

    def pieces(self, limit: int = PIECE_BYTES) -> tuple[tuple[Slice, ...], ...]:
        """Cut the contribution into pieces of at most `limit` bytes; a block larger than that spans several."""
        room = capacity = max(1, limit // ITEM_BYTES)
        pieces: list[list[Slice]] = [[]]
        for block in self.blocks:
            start = 0
            while start < block.entries:
                if room == 0:
                    pieces.append([])
                    room = capacity
                stop = min(block.entries, start + room)
                pieces[-1].append(Slice(block, start, stop))
                room -= stop - start
                start = stop
        return tuple(tuple(piece) for piece in pieces)

    def follows(self, derived: Layout) -> bool:
        """Whether this layout is one that was derived anew, but for what rounding may do to exponents: one step."""
        if self.model_copy(update={"groups": derived.groups}) != derived or len(self.groups) != len(derived.groups):
            return False
        return all(
            own.model_copy(update={"exponents": other.exponents}) == other
            and len(own.exponents) == len(other.exponents)
            and all(abs(a - b) <= 1 for a, b in zip(own.exponents, other.exponents, strict=True))
            for own, other in zip(self.groups, derived.groups, strict=True)
        )

    def linear(self) -> Iterator[tuple[Group, Linear]]:
        """Yield each weight that is merged in closed form with its group."""
        for group in self.groups:
            for weight in group.weights:
                yield group, weight

    def to_json(self) -> str:
        """Return the canonical JSON text."""
        return canonical_json(self.model_dump(mode="json")).decode("utf-8")

    @staticmethod
    def parse(text: str, source: str = "layout") -> Layout:
        """Parse JSON text; raises PlanError naming `source`."""
        try:
            return Layout.model_validate_json(text)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            key = ".".join(map(str, problem["loc"])) or "the document"
            raise PlanError(f"{source}: not a layout: {key!r}: {problem['msg']}") from None

    @staticmethod
    def read(path: Path) -> Layout:
        """Read a layout file; raises PlanError naming it."""
        return Layout.parse(read_text(path), str(path))


def gram_block(group: str) -> str:
    """Name of the block that holds a group's packed Gram matrix."""
    return f"gram:{group}"


def delta_block(parameter: str) -> str:
    """Name of the block that holds a parameter's difference from the base."""
    return f"delta:{parameter}"

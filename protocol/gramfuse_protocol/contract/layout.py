"""The layout: the ordered list of blocks that every contribution consists of.

It is derived once from the base model and the plan (`gramfuse_model.derive_layout`), travels as JSON, and its
digest is in the locked plan, so that both sides agree on names, shapes and order before anything is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, ConfigDict, Field, ValidationError, model_validator

from gramfuse_protocol.bounds import (
    DIMENSIONS,
    ENTRIES,
    EXPERTS,
    FEATURES,
    LAYOUT_CHARACTERS,
    SILOS,
    TENSORS,
    VALUES,
    Many,
    check_keys,
    parse_json,
)
from gramfuse_protocol.canonical import canonical_json, digest
from gramfuse_protocol.contract.gram_structure import Blocks, parse_structure
from gramfuse_protocol.documents import read_text
from gramfuse_protocol.errors import ContributionError, PlanError
from gramfuse_protocol.text import Legible, Word, one_line, quoted

ITEM_BYTES = 4
"""Statistics travel as little-endian float32."""

PIECE_BYTES = 128 * 2**20
"""Most bytes of statistics in one piece."""

Positive = Annotated[int, Field(ge=1, le=2**53 - 1)]

Shape = Annotated[Many[Positive], Field(max_length=DIMENSIONS)]
"""Of a tensor."""

EXPONENT = 40
Exponent = Annotated[int, Field(ge=-EXPONENT, le=EXPONENT)]
"""Of two, of a feature's amplitude."""

Rows = Literal["input", "turned", "target", "all", "table"]
"""Which rows of a layer's input count: those of real input tokens, with the examples in the first dimension or turned,
in the second; those of real target tokens; all, as many for each example; or a table's, which all examples share."""


def _structure(text: str) -> str:
    parse_structure(text)
    return text


class _Frozen(Legible):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Linear(_Frozen):
    """A weight that is merged in closed form, or the outputs of it that its group's part has.

    torch's `nn.Linear` stores it transposed, (d_out, d_in); transformers' `Conv1D` stores (d_in, d_out).
    """

    weight: Word
    d_out: Positive
    """Outputs that are merged in this group."""
    transposed: bool


class Group(_Frozen):
    """Linear weights whose modules receive the identical tensors, and so share one Gram matrix.

    Or one tensor that holds a linear weight of each of several experts, (experts, d_out, d_in): each has a Gram matrix
    of its own, of the rows that are routed to it, divided by the number of all rows.
    """

    name: Word
    d_in: Positive
    structure: Annotated[str, Field(max_length=32), AfterValidator(_structure)]
    weights: Annotated[Many[Linear], Field(min_length=1)]
    rows: Annotated[Many[Rows], Field(min_length=1)] = ("input",)
    """For each call of a module in one run of the model, in order, which rows of its input the Gram matrix is of."""
    part: int | None = None
    """Index of the layout's part whose outputs and silos these are, if not all."""
    experts: Annotated[int, Field(ge=1, le=EXPERTS)] | None = None
    """How many experts the tensor holds, if it is one of experts."""
    exponents: Many[Exponent] = ()
    """For each feature, the power of two that its root mean square on public text stays below; for secure sums. It is
    one for all experts."""

    @model_validator(mode="after")
    def _one_exponent_for_each_feature(self) -> Group:
        if len(self.exponents) not in (0, self.d_in):
            raise ValueError(f"group {self.name!r} has {len(self.exponents)} exponents for {self.d_in} features")
        return self

    @cached_property
    def blocks(self) -> Blocks:
        """The blocks of this group's Gram matrix, or of those of its experts."""
        return Blocks.of(self.structure, self.d_in, self.experts or 1)

    @property
    def features(self) -> int:
        """Input features of all experts, or of the group."""
        return self.d_in * (self.experts or 1)

    @property
    def d_out(self) -> int:
        """Outputs of all its weights together."""
        return sum(weight.d_out for weight in self.weights)


class SharedOutputs(_Frozen):
    """Outputs of the last layer that the same silos train: labels that only these annotate."""

    silos: Annotated[Many[Word], Field(min_length=1, max_length=SILOS)]
    outputs: Annotated[Many[Annotated[int, Field(ge=0, lt=FEATURES)]], Field(min_length=1)]


class Tensor(_Frozen):
    """A parameter that is trained and merged, or a buffer that training changes."""

    name: Word
    shape: Shape
    merge: Literal["regmean", "mean", "sum"]
    """`sum` is for counters: integers, of which each silo's growth is added."""
    buffer: bool = False
    """Whether it is saved with the model and is no parameter, as running means of a normalisation are."""
    parted: bool = False
    """Whether its first dimension is the last layer's outputs, each of which is merged over the silos of its part."""
    context_free: bool = False
    """Whether it is the weight of a layer that sees single tokens, or patches of an image, without their context.

    Each row of its input is then one that whoever has the base model can compute. From a full Gram matrix, and from the
    diagonal of a wide one, it can be told which tokens occur, where, and how often.
    """
    unmatched: bool = False
    """Whether it is the weight of a linear layer that is averaged since it cannot be told which rows of its input are
    tokens."""


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

    Example:
        >>> gramfuse.Layout.parse(layout.to_json()).digest == layout.digest
        True

    Args:
        groups: in the order in which the base model runs them.
        tensors: every parameter that is trained and merged, in the order of the base model; then buffers that training
            changes.
        frozen: parameters that stay as they are; they never leave a silo.
        parts: outputs of the last layer by the silos that have them; empty if all silos have all.
    """

    version: Literal[1] = 1
    groups: Annotated[Many[Group], Field(max_length=TENSORS)]
    tensors: Annotated[Many[Tensor], Field(min_length=1, max_length=TENSORS)]
    frozen: Annotated[Many[Word], Field(max_length=TENSORS)]
    parts: Annotated[Many[SharedOutputs], Field(max_length=SILOS)] = ()

    @model_validator(mode="after")
    def _holds_together(self) -> Layout:
        for kind, names in (("group", [g.name for g in self.groups]), ("tensor", [t.name for t in self.tensors])):
            if len(set(names)) != len(names):
                raise ValueError(f"a {kind} name comes twice")
        outputs = [output for part in self.parts for output in part.outputs]
        if sorted(outputs) != list(range(len(outputs))):
            raise ValueError("parts do not have each output once")
        if any(tensor.parted and tensor.shape[:1] != (len(outputs),) for tensor in self.tensors):
            raise ValueError("a parted tensor has another number of outputs than the parts")
        if any(t.parted or t.context_free or t.merge == "regmean" for t in self.tensors if t.buffer):
            raise ValueError("a buffer is no weight of a layer")
        if any(not t.buffer or t.shape for t in self.tensors if t.merge == "sum"):
            raise ValueError("a tensor is summed that is no counter")
        if sum(tensor.parted for tensor in self.tensors) * len(self.parts) > VALUES:
            raise ValueError("more parted tensors and parts than any model's last layer has")
        merged = {(t.name, p): t.shape for t in self.tensors if t.merge == "regmean" for p in self._parts_of(t)}
        expected = {}
        for group, linear in self.linear():
            if group.part is not None and not (linear.transposed and 0 <= group.part < len(self.parts)):
                raise ValueError(
                    f"group {group.name!r} is of a part that is not there, or of a weight that has no parts"
                )
            if group.experts and not (linear.transposed and group.part is None and len(group.weights) == 1):
                raise ValueError(f"group {group.name!r} is of experts, and of more than one tensor of theirs")
            if (linear.weight, group.part) in expected:
                raise ValueError(f"weight {linear.weight!r} is in two groups")
            if group.part is not None and linear.d_out != len(self.parts[group.part].outputs):
                raise ValueError(f"weight {linear.weight!r} has another number of outputs than its part")
            d_out = linear.d_out if group.part is None else len(outputs)
            shape = (d_out, group.d_in) if linear.transposed else (group.d_in, d_out)
            expected[linear.weight, group.part] = (group.experts, *shape) if group.experts else shape
        if merged != expected:
            raise ValueError("groups and tensors do not fit together")
        if any(tensor.unmatched and tensor.merge != "mean" for tensor in self.tensors):
            raise ValueError("a tensor is merged in closed form, and the rows of its input cannot be matched")
        context_free = {tensor.name for tensor in self.tensors if tensor.context_free}
        for group in self.groups:
            if len({weight.weight in context_free for weight in group.weights}) > 1:
                raise ValueError(f"group {group.name!r} has weights of layers without context and others")
        if max(self.sum_entries, self.contribution_bytes // ITEM_BYTES) > ENTRIES:
            raise ValueError(f"a contribution would have more than {ENTRIES:,} elements")
        return self

    def _parts_of(self, tensor: Tensor) -> Iterable[int | None]:
        return range(len(self.parts)) if tensor.parted else (None,)

    def held(self, silo: str | None) -> tuple[bool, ...]:
        """Return for each part whether a silo has its outputs.

        Raises:
            ContributionError: if it matters which silo it is, and none is named.
        """
        if silo is None and self.parts:
            raise ContributionError("this layout has labels that only some silos annotate: say which silo it is")
        return tuple(silo in part.silos for part in self.parts)

    def by_output(self, values: Sequence[float]) -> NDArray[np.float64]:
        """Return one value for each part as one for each output of a parted tensor, float64 (outputs,)."""
        spread = np.empty(sum(len(part.outputs) for part in self.parts))
        for part, value in zip(self.parts, values, strict=True):
            spread[list(part.outputs)] = value
        return spread

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
        """All blocks of what is summed over silos, in order (`gramfuse_model.normal_equations`).

        `count`: weight c, examples, token rows of each group, and c of each part. `s:<group>`: packed c·Ĝ.
        `t:<group>`: c·Ĝ·Δ, (d_in, d_out), weights side by side, experts one below the other. `m:<parameter>`: c·Δ, in
        the parameter's own shape, and of a counter Δ. Of a part that a silo does not have, it adds zeros.
        """
        count = Block("count", (2 + len(self.groups) + len(self.parts),))
        s = tuple(Block(f"s:{group.name}", (group.blocks.entries,)) for group in self.groups)
        t = tuple(Block(f"t:{group.name}", (group.features, group.d_out)) for group in self.groups)
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
        return tuple(self.piece(number, limit) for number in range(self.piece_count(limit)))

    def piece_count(self, limit: int = PIECE_BYTES) -> int:
        """Return how many pieces there are."""
        return -(-self.contribution_bytes // ITEM_BYTES // _capacity(limit))

    def piece(self, number: int, limit: int = PIECE_BYTES) -> tuple[Slice, ...]:
        """Return one piece: nothing of the others is made, however many there would be.

        Args:
            number: from 0 on, below `piece_count`.
        """
        capacity, found = _capacity(limit), []
        first, last = number * capacity, (number + 1) * capacity
        for block, begins in zip(self.blocks, self._begins, strict=True):
            start, stop = max(0, first - begins), min(block.entries, last - begins)
            if start < stop:
                found.append(Slice(block, start, stop))
        return tuple(found)

    @cached_property
    def _begins(self) -> tuple[int, ...]:
        """Where each block begins in a contribution, in elements."""
        return (0, *accumulate(block.entries for block in self.blocks[:-1]))

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
            check_keys(parse_json(text, LAYOUT_CHARACTERS, FEATURES), Layout)
            return Layout.model_validate_json(text)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            key = quoted(".".join(map(str, problem["loc"])) or "the document")
            raise PlanError(f"{source}: not a layout: {key}: {one_line(problem['msg'], 1000)}") from None
        except ValueError as error:
            raise PlanError(f"{source}: not a layout: {one_line(str(error), 1000)}") from None

    @staticmethod
    def read(path: Path) -> Layout:
        """Read a layout file; raises PlanError naming it."""
        return Layout.parse(read_text(path), str(path))


def _capacity(limit: int) -> int:
    """Return how many elements a piece of at most `limit` bytes has."""
    return max(1, limit // ITEM_BYTES)


def gram_block(group: str) -> str:
    """Name of the block that holds a group's packed Gram matrix."""
    return f"gram:{group}"


def delta_block(parameter: str) -> str:
    """Name of the block that holds a parameter's difference from the base."""
    return f"delta:{parameter}"

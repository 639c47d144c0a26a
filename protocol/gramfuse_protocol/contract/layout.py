"""The layout: the ordered list of blocks that make up every contribution.

It is derived once from the base model and the plan (`gramfuse_model.derive_layout`) and sent as JSON. The locked plan
contains its digest, so both sides agree on names, shapes and order before anything is measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, ValidationError, model_validator

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
from gramfuse_protocol.contract.form import Block, Exponent, Form, Slice
from gramfuse_protocol.contract.gram_structure import Blocks, parse_structure
from gramfuse_protocol.contract.head_layout import HeadLayout
from gramfuse_protocol.documents import read_text
from gramfuse_protocol.errors import ContributionError, PlanError
from gramfuse_protocol.frozen import LegibleFrozen
from gramfuse_protocol.text import Word, one_line, quoted

ITEM_BYTES = 4
"""Models and statistics are sent as little-endian float32."""

Positive = Annotated[int, Field(ge=1, le=2**53 - 1)]

Shape = Annotated[Many[Positive], Field(max_length=DIMENSIONS)]
"""The shape of a tensor."""

RowKind = Literal["input", "turned", "target", "all", "table"]
"""Which rows of a layer's input count.

`input`: real input tokens, examples in the first dimension; `turned`: the same, examples in the second dimension;
`target`: real target tokens; `all`: every row, equally many for each example; `table`: every row of a table that all
examples share.
"""


def _structure(text: str) -> str:
    parse_structure(text)
    return text


class Linear(LegibleFrozen):
    """A weight that is merged in closed form, or those of its outputs that belong to its group's part.

    `nn.Linear` stores it transposed, (d_out, d_in); transformers' `Conv1D` stores (d_in, d_out).
    """

    weight: Word
    d_out: Positive
    """Number of outputs merged in this group."""
    transposed: bool


class Group(LegibleFrozen):
    """Linear weights whose modules receive identical tensors and so share one Gram matrix.

    A group can also be one tensor with the linear weights of several experts, (experts, d_out, d_in). Each expert then
    has its own Gram matrix, of the rows that are routed to it, divided by the number of all rows.
    """

    name: Word
    d_in: Positive
    structure: Annotated[str, Field(max_length=32), AfterValidator(_structure)]
    weights: Annotated[Many[Linear], Field(min_length=1)]
    rows: Annotated[Many[RowKind], Field(min_length=1)] = ("input",)
    """Which rows of the input enter the Gram matrix, for each call of a module in one forward pass, in order."""
    part: int | None = None
    """Index of the layout's part that this group covers; None if it covers all outputs and silos."""
    experts: Annotated[int, Field(ge=1, le=EXPERTS)] | None = None
    """Number of experts in the tensor; None if it is not a tensor of experts."""
    exponents: Many[Exponent] = ()
    """For each feature, the power of two above its root mean square on public text; used to scale secure sums.

    All experts share them.
    """

    @model_validator(mode="after")
    def _one_exponent_for_each_feature(self) -> Group:
        if len(self.exponents) not in (0, self.d_in):
            raise ValueError(f"group {self.name!r} has {len(self.exponents)} exponents for {self.d_in} features")
        return self

    @cached_property
    def blocks(self) -> Blocks:
        """The blocks of this group's Gram matrix, or of its experts' Gram matrices."""
        return Blocks.of(self.structure, self.d_in, self.experts or 1)

    @property
    def features(self) -> int:
        """Number of input features, summed over experts."""
        return self.d_in * (self.experts or 1)

    @property
    def d_out(self) -> int:
        """Number of outputs of all its weights together."""
        return sum(weight.d_out for weight in self.weights)


class SharedOutputs(LegibleFrozen):
    """Outputs of the last layer that the same silos train: labels that only these silos annotate."""

    silos: Annotated[Many[Word], Field(min_length=1, max_length=SILOS)]
    outputs: Annotated[Many[Annotated[int, Field(ge=0, lt=FEATURES)]], Field(min_length=1)]


class Tensor(LegibleFrozen):
    """A parameter that is trained and merged, or a buffer that training changes."""

    name: Word
    shape: Shape
    merge: Literal["regmean", "mean", "sum"]
    """`sum` is for integer counters: the silos' increments are added."""
    buffer: bool = False
    """Whether it is a persistent buffer, such as the running mean of a batch norm, not a parameter."""
    parted: bool = False
    """Whether its first dimension is the last layer's outputs, each merged over the silos of its part."""
    context_free: bool = False
    """Whether it is the weight of a layer that sees single tokens, or image patches, without context.

    Anyone with the base model can compute each possible row of its input. A full Gram matrix, or the diagonal of a wide
    one, then reveals which tokens occur, at which positions, and how often.
    """
    unmatched: bool = False
    """Whether it is a linear layer's weight that is averaged because the token rows of its input cannot be
    identified."""


class Layout(LegibleFrozen, Form):
    """Groups and tensors of one plan over one base model.

    Example:
        >>> gramfuse.Layout.parse(layout.to_json()).digest == layout.digest
        True

    Args:
        groups: in the order in which the base model calls them.
        tensors: the parameters that are trained and merged, in the order of the base model; then the buffers that
            training changes.
        frozen: parameters that training leaves unchanged; they never leave a silo.
        parts: the last layer's outputs, partitioned by which silos train them; empty if all silos train all.
        head: the last layer, if the plan fits it in closed form.
    """

    dtype: ClassVar[str] = "float32"

    version: Literal[1] = 1
    groups: Annotated[Many[Group], Field(max_length=TENSORS)]
    tensors: Annotated[Many[Tensor], Field(min_length=1, max_length=TENSORS)]
    frozen: Annotated[Many[Word], Field(max_length=TENSORS)]
    parts: Annotated[Many[SharedOutputs], Field(max_length=SILOS)] = ()
    head: HeadLayout | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> Layout:
        for kind, names in (("group", [g.name for g in self.groups]), ("tensor", [t.name for t in self.tensors])):
            if len(set(names)) != len(names):
                raise ValueError(f"a {kind} name occurs twice")
        outputs = [output for part in self.parts for output in part.outputs]
        if sorted(outputs) != list(range(len(outputs))):
            raise ValueError("the parts do not contain each output exactly once")
        if any(tensor.parted and tensor.shape[:1] != (len(outputs),) for tensor in self.tensors):
            raise ValueError("a parted tensor and the parts differ in their number of outputs")
        if any(t.parted or t.context_free or t.merge == "regmean" for t in self.tensors if t.buffer):
            raise ValueError("a buffer cannot be a layer's weight")
        if any(not t.buffer or t.shape for t in self.tensors if t.merge == "sum"):
            raise ValueError("a summed tensor is not a counter (a scalar buffer)")
        if sum(tensor.parted for tensor in self.tensors) * len(self.parts) > VALUES:
            raise ValueError("too many parted tensors and parts for a last layer")
        merged = {(t.name, p): t.shape for t in self.tensors if t.merge == "regmean" for p in self._parts_of(t)}
        expected = {}
        for group, linear in self.linear():
            if group.part is not None and not (linear.transposed and 0 <= group.part < len(self.parts)):
                raise ValueError(f"group {group.name!r} names a part that does not exist, or its weight has no parts")
            if group.experts and not (linear.transposed and group.part is None and len(group.weights) == 1):
                raise ValueError(f"group {group.name!r} has experts, so it must be exactly one tensor without parts")
            if (linear.weight, group.part) in expected:
                raise ValueError(f"weight {linear.weight!r} is in two groups")
            if group.part is not None and linear.d_out != len(self.parts[group.part].outputs):
                raise ValueError(f"weight {linear.weight!r} and its part differ in their number of outputs")
            d_out = linear.d_out if group.part is None else len(outputs)
            shape = (d_out, group.d_in) if linear.transposed else (group.d_in, d_out)
            expected[linear.weight, group.part] = (group.experts, *shape) if group.experts else shape
        if merged != expected:
            raise ValueError("groups and tensors do not match")
        if any(tensor.unmatched and tensor.merge != "mean" for tensor in self.tensors):
            raise ValueError("a tensor whose input rows cannot be identified must be averaged")
        context_free = {tensor.name for tensor in self.tensors if tensor.context_free}
        for group in self.groups:
            if len({weight.weight in context_free for weight in group.weights}) > 1:
                raise ValueError(f"group {group.name!r} mixes weights of context-free layers with others")
        forms: tuple[Form, ...] = (self,) if self.head is None else (self, self.head)
        if any(max(form.sum_entries, sum(block.entries for block in form.blocks)) > ENTRIES for form in forms):
            raise ValueError(f"a contribution would have more than {ENTRIES:,} elements")
        if self.head is not None:
            self._check_head(self.head)
        return self

    def _check_head(self, head: HeadLayout) -> None:
        shapes = {tensor.name: tensor.shape for tensor in self.tensors if not tensor.buffer}
        if shapes.get(head.weight) != (head.outputs, head.features):
            raise ValueError("the weight of the head is not a tensor of its shape")
        if head.bias is not None and shapes.get(head.bias) != (head.outputs,):
            raise ValueError("the bias of the head is not a tensor of its shape")

    def _parts_of(self, tensor: Tensor) -> Iterable[int | None]:
        return range(len(self.parts)) if tensor.parted else (None,)

    def held(self, silo: str | None) -> tuple[bool, ...]:
        """Return for each part whether a silo trains its outputs.

        Raises:
            ContributionError: if the layout has parts and no silo is named.
        """
        if silo is None and self.parts:
            raise ContributionError("this layout has labels that only some silos annotate: pass the silo's name")
        return tuple(silo in part.silos for part in self.parts)

    def by_output(self, values: Sequence[float]) -> NDArray[np.float64]:
        """Expand one value per part into one value per output of a parted tensor, float64 (outputs,)."""
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
        """All blocks of a contribution, in order.

        `gram:<group>` is a packed Gram matrix, `delta:<parameter>` a weight difference.
        """
        grams = tuple(Block(gram_block(group.name), (group.blocks.entries,)) for group in self.groups)
        return grams + tuple(Block(delta_block(tensor.name), tensor.shape) for tensor in self.tensors)

    @cached_property
    def sums(self) -> tuple[Block, ...]:
        """All blocks that are summed over silos, in order (`gramfuse_model.normal_equations`).

        `count`: weight c, examples, token rows of each group, and c for each part. `s:<group>`: packed c·Ĝ.
        `t:<group>`: c·Ĝ·Δ, (d_in, d_out), weights side by side, experts one below the other. `m:<parameter>`: c·Δ in
        the parameter's shape; Δ for a counter. A silo adds zeros for parts that it does not train.
        """
        count = Block("count", (2 + len(self.groups) + len(self.parts),))
        s = tuple(Block(f"s:{group.name}", (group.blocks.entries,)) for group in self.groups)
        t = tuple(Block(f"t:{group.name}", (group.features, group.d_out)) for group in self.groups)
        m = tuple(Block(f"m:{tensor.name}", tensor.shape) for tensor in self.tensors)
        return (count, *s, *t, *m)

    @property
    def deltas(self) -> tuple[Slice, ...]:
        """The blocks that represent a whole model: each tensor's difference from the base."""
        return tuple(Slice(block, 0, block.entries) for block in self.blocks[len(self.groups) :])

    @property
    def gram_names(self) -> tuple[str, ...]:
        """Names of the groups."""
        return tuple(group.name for group in self.groups)

    def follows(self, derived: Layout) -> bool:
        """Return whether this layout equals a newly derived one, up to one step in exponents, which rounding allows."""
        scaled, others = self._scaled, derived._scaled
        if self.model_copy(update={"groups": derived.groups, "head": derived.head}) != derived:
            return False
        return len(scaled) == len(others) and all(
            one.model_copy(update={"exponents": other.exponents}) == other
            and len(one.exponents) == len(other.exponents)
            and all(abs(a - b) <= 1 for a, b in zip(one.exponents, other.exponents, strict=True))
            for one, other in zip(scaled, others, strict=True)
        )

    @property
    def _scaled(self) -> tuple[Group | HeadLayout, ...]:
        """Everything with exponents."""
        return self.groups if self.head is None else (*self.groups, self.head)

    def linear(self) -> Iterator[tuple[Group, Linear]]:
        """Yield each weight that is merged in closed form, with its group."""
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


def gram_block(group: str) -> str:
    """Return the name of the block with a group's packed Gram matrix."""
    return f"gram:{group}"


def delta_block(parameter: str) -> str:
    """Return the name of the block with a parameter's difference from the base."""
    return f"delta:{parameter}"

"""The head that a plan fits in closed form: its last layer, and the sums over examples that it is fitted from."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from gramfuse_protocol.bounds import FEATURES, Many
from gramfuse_protocol.canonical import digest
from gramfuse_protocol.contract.form import Block, Exponent, Form
from gramfuse_protocol.contract.gram_structure import Blocks
from gramfuse_protocol.frozen import LegibleFrozen
from gramfuse_protocol.text import Word

SECOND = "head:second"
"""Block of Σ [x; 1] [x; 1]ᵀ, packed as a Gram matrix is."""

FIRST = "head:first"
"""Block of Σ [x; 1] yᵀ, (features + 1, columns)."""


class HeadLayout(LegibleFrozen, Form):
    """The last linear layer of a model, and the form of the sums that a silo contributes to fit it.

    With x the features that enter the layer, (features,), and y what the kind of task makes of an example's target
    (`gramfuse_protocol.tasks.registry.TaskKind.targets`), (columns,), the blocks are SECOND and FIRST. The last row and
    column of the first count examples.

    Args:
        fit: how the head is fitted (`gramfuse_protocol.tasks.registry.TaskKind.fit`).
        weight: name of the layer's weight, (outputs, features).
        bias: name of its bias, (outputs,); None if it has none.
        features: number of input features.
        outputs: number of outputs.
        columns: number of columns of y.
        exponents: for each feature, the power of two above its root mean square on public text.
    """

    dtype: ClassVar[str] = "float64"

    fit: Word
    weight: Word
    bias: Word | None
    features: Annotated[int, Field(ge=1, lt=FEATURES)]
    outputs: Annotated[int, Field(ge=1, lt=FEATURES)]
    columns: Annotated[int, Field(ge=1, lt=FEATURES)]
    exponents: Many[Exponent]

    @model_validator(mode="after")
    def _one_exponent_for_each_feature(self) -> HeadLayout:
        if len(self.exponents) != self.features:
            raise ValueError(f"the head has {len(self.exponents)} exponents for {self.features} features")
        return self

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical form."""
        return digest(self.model_dump(mode="json"))

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the layer's parameters."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def packing(self) -> Blocks:
        """How SECOND is packed."""
        return Blocks.of("full", self.features + 1)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """SECOND and FIRST."""
        return (
            Block(SECOND, (self.packing.entries,)),
            Block(FIRST, (self.features + 1, self.columns)),
        )

    @property
    def sums(self) -> tuple[Block, ...]:
        """The same blocks: sums over examples add up over silos."""
        return self.blocks

    @property
    def gram_names(self) -> tuple[str, ...]:
        """None: every row is an example, and the blocks count them."""
        return ()

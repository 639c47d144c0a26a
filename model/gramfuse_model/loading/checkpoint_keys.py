"""Checks that a model's files have exactly its weights, by name.

transformers initialises missing weights randomly and ignores unexpected ones, without an error. A base model may lack
the parts that fine-tuning initialises, and may have the head of its pre-training; anything else is refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from gramfuse_model.heads import head_parameters, pooler_parameters
from gramfuse_protocol.errors import ModelError
from gramfuse_protocol.text import quoted

HARMLESS = ("final_logits_bias", "num_batches_tracked")
"""Suffixes of buffers that may be missing: their initial value is always the same, or they do not affect outputs."""

STALE = re.compile(
    r"(^|\.)(position_ids|inv_freq|masked_bias|causal_mask|relative_position_index|version)$|(attn|attention)\.bias$"
)
"""Names of buffers that older versions of transformers saved and newer ones compute."""

ADAPTER = re.compile(r"(^|[._])(lora|loha|lokr|ia3|base_layer|adapters?)([._]|$)", re.IGNORECASE)
"""Names of adapter weights."""

UNLOAD = "merge the adapter into the model with peft's merge_and_unload(), and save the result"

WRAPPERS = {
    "_orig_mod": "torch.compile adds it; call save_pretrained on the original model (model._orig_mod)",
    "module": "DataParallel adds it; call save_pretrained on the wrapped model (model.module)",
    "_fsdp_wrapped_module": "FSDP adds it; gather the full model, and call save_pretrained on it",
    "_checkpoint_wrapped_module": "activation checkpointing adds it; call save_pretrained on the unwrapped model",
    "base_model.model": f"peft adds it; {UNLOAD}",
    "base_layer": f"peft adds it; {UNLOAD}",
}
"""Name components that wrappers of a model or its layers add, with the remedy."""


class Keys(NamedTuple):
    """The differences between the names in a model's files and the model's parameters and persistent buffers.

    Args:
        missing: names that are only in the model.
        mismatched: names whose shapes differ: shape in the files and shape in the model.
        unexpected: names that are only in the files.
    """

    missing: frozenset[str]
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    unexpected: frozenset[str]

    @staticmethod
    def of(loaded: Mapping[str, Any]) -> Keys:
        """Convert the loading info of `from_pretrained(…, output_loading_info=True)`."""
        return Keys(
            frozenset(loaded["missing_keys"]),
            {name: (tuple(saved), tuple(expected)) for name, saved, expected in loaded["mismatched_keys"]},
            frozenset(loaded["unexpected_keys"]),
        )

    @property
    def fresh(self) -> frozenset[str]:
        """Names of the model's parameters whose values are not from the files."""
        return self.missing | self.mismatched.keys()


def check_keys(model: PreTrainedModel, keys: Keys, where: str, *, labels: int, whole: bool) -> None:
    """Check that a model's weights match its files.

    Args:
        keys: the differences between files and model.
        where: the directory of its files.
        labels: number of labels in its own configuration, regardless of the task.
        whole: whether it is a fine-tuned model, in which nothing may be new. Otherwise it is a base: the files may lack
            its head and pooler, may have a head for other labels, and may have other parts from pre-training.

    Raises:
        ModelError: naming the parameter and what to do.
    """
    new = frozenset() if whole else head_parameters(model) | pooler_parameters(model)
    missing = sorted(name for name in keys.missing - new if not name.endswith(HARMLESS))
    if missing:
        raise ModelError(f"{where}: {_missing_message(model, missing, keys.unexpected, whole=whole)}")
    for name, (saved, expected) in sorted(keys.mismatched.items()):
        if name not in new or saved[:1] != (labels,) or saved[1:] != expected[1:]:
            raise ModelError(
                f"{where}: {name!r} is {saved} in the files, but {expected} according to config.json; transformers "
                "would replace it with random numbers. Correct config.json, or load the model with the right "
                "configuration and save it with save_pretrained"
            )
    relevant = sorted(_relevant(model, keys.unexpected, whole=whole))
    if relevant:
        remedy = (
            UNLOAD
            if any(map(ADAPTER.search, relevant))
            else "correct config.json (number of layers, biases), or save the model with its own class"
        )
        raise ModelError(
            f"{where}: has {quoted(relevant[0])}{_count_note(relevant)}, which a {type(model).__name__} with this "
            f"configuration does not have; it would be ignored, and the model would compute something else. Instead, "
            f"{remedy}"
        )


def _missing_message(model: PreTrainedModel, missing: list[str], unexpected: Collection[str], *, whole: bool) -> str:
    """Describe what is missing, with the likely cause."""
    wrapper = _wrapper(model.base_model_prefix, set(missing), unexpected)
    if wrapper is not None:
        remedy = WRAPPERS.get(wrapper, "remove it from the names, load the weights, and call save_pretrained")
        return (
            f"the names of its weights contain {quoted(f'{wrapper}.')}, but those of a {type(model).__name__} do not, "
            f"so {missing[0]!r}{_count_note(missing)} would be random numbers; {remedy}"
        )
    rule = "MODEL must be the whole fine-tuned model, including its head" if whole else "only a base's head may be new"
    saved, needed = model.config.architectures or (), type(model).__name__
    remedy = "Get the files again, or correct config.json"
    if whole and needed not in saved:
        remedy = (
            f"It was saved as a {', '.join(saved) or 'model without a head'}, but this task needs a {needed}: check "
            "--task. If it is right, get the files again, or correct config.json"
        )
    return (
        f"its files lack {missing[0]!r}{_count_note(missing)}; transformers would replace it with random numbers, but "
        f"{rule}. {remedy}"
    )


def _count_note(names: Collection[str]) -> str:
    return f" ({len(names)} such names in all)" if len(names) > 1 else ""


def _wrapper(prefix: str, missing: set[str], unexpected: Collection[str]) -> str | None:
    """Return the name component whose removal turns unexpected names into at least half of the missing ones, if any."""
    for part in (*WRAPPERS, *sorted({name.split(".")[0] for name in unexpected})):
        bare = {f".{name}".replace(f".{part}.", ".")[1:] for name in unexpected}
        if 2 * len(missing & (bare | {f"{prefix}.{name}" for name in bare})) >= len(missing):
            return part
    return None


def _relevant(model: PreTrainedModel, unexpected: Iterable[str], *, whole: bool) -> Iterable[str]:
    """Yield the unexpected names without which the model may compute something other than the saved one.

    A base's files may have anything outside its body. Names in one of its layers, in an additional layer, or in a
    module with other parameters are relevant.
    """
    modules = dict(model.named_modules())
    for name in unexpected:
        if STALE.search(name):
            continue
        if whole:
            if ".pooler." not in f".{name}":  # some models have bodies without a pooler, and do not use it
                yield name
            continue
        for path in (name, f"{model.base_model_prefix}.{name}"):
            parts = path.split(".")
            position = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
            layers = modules.get(".".join(parts[:position]))
            parent = modules.get(".".join(parts[:-1]))
            has_sibling = parts[-1] in ("weight", "bias") and any(
                True for _ in (parent or nn.Module()).parameters(False)
            )
            if isinstance(layers, nn.ModuleList) or has_sibling:
                yield name
                break

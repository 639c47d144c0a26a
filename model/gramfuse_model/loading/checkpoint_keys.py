"""What a model's files have of its weights, by their names.

What the files lack, transformers fills with random numbers, and what it has no place for it leaves out; both without an
error. A base may lack what fine-tuning begins anew, and may have the head of its pre-training; all else is refused.
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
"""What the names of buffers end with that are the same wherever they are missing, or that nothing is computed from."""

STALE = re.compile(
    r"(^|\.)(position_ids|inv_freq|masked_bias|causal_mask|relative_position_index|version)$|(attn|attention)\.bias$"
)
"""Names of buffers that older versions of transformers wrote, and that are computed now."""

ADAPTER = re.compile(r"(^|[._])(lora|loha|lokr|ia3|base_layer|adapters?)([._]|$)", re.IGNORECASE)
"""Names that adapters have."""

UNLOAD = "merge the adapter into the model with peft's merge_and_unload(), and save that"

WRAPPERS = {
    "_orig_mod": "torch.compile puts it there; call save_pretrained of the model that was compiled (model._orig_mod)",
    "module": "DataParallel puts it there; call save_pretrained of the model that was wrapped (model.module)",
    "_fsdp_wrapped_module": "FSDP puts it there; gather the whole model, and call its save_pretrained",
    "_checkpoint_wrapped_module": "activation checkpointing puts it there; call save_pretrained of the unwrapped model",
    "base_model.model": f"peft puts it there; {UNLOAD}",
    "base_layer": f"peft puts it there; {UNLOAD}",
}
"""Parts of names that come of wrappers around a model or its layers, and what to do about them."""


class Keys(NamedTuple):
    """How the names in a model's files and those of its parameters and persistent buffers differ.

    Args:
        missing: the model's, which the files lack.
        mismatched: of another shape in the files: shape there and in the model, by name.
        unexpected: the files', which the model lacks.
    """

    missing: frozenset[str]
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    unexpected: frozenset[str]

    @staticmethod
    def of(loaded: Mapping[str, Any]) -> Keys:
        """Return what `from_pretrained(…, output_loading_info=True)` says."""
        return Keys(
            frozenset(loaded["missing_keys"]),
            {name: (tuple(there), tuple(here)) for name, there, here in loaded["mismatched_keys"]},
            frozenset(loaded["unexpected_keys"]),
        )

    @property
    def fresh(self) -> frozenset[str]:
        """Names of the model's parameters whose values are not of the files."""
        return self.missing | self.mismatched.keys()


def check_keys(model: PreTrainedModel, keys: Keys, where: str, *, labels: int, whole: bool) -> None:
    """Check that a model is what its files say.

    Args:
        keys: how it was loaded.
        where: the directory of its files.
        labels: that its own configuration has, whatever the task.
        whole: whether it is a fine-tuned model, of which nothing may be new. Otherwise it is a base: the files may lack
            its head and its pooler, or have a head for other labels, and may have what else it was pre-trained with.

    Raises:
        ModelError: naming the parameter, and what to do.
    """
    new = frozenset() if whole else head_parameters(model) | pooler_parameters(model)
    missing = sorted(name for name in keys.missing - new if not name.endswith(HARMLESS))
    if missing:
        raise ModelError(f"{where}: {_missing(model, missing, keys.unexpected, whole=whole)}")
    for name, (there, here) in sorted(keys.mismatched.items()):
        if name not in new or there[:1] != (labels,) or there[1:] != here[1:]:
            raise ModelError(
                f"{where}: {name!r} is {there} in the files, and {here} by config.json; transformers would put random "
                "numbers in its place. Correct config.json, or load the model with the right configuration and save it "
                "with save_pretrained"
            )
    odd = sorted(_of_the_model(model, keys.unexpected, whole=whole))
    if odd:
        remedy = (
            UNLOAD
            if any(map(ADAPTER.search, odd))
            else "correct config.json (number of layers, biases), or save the model with the class that it is of"
        )
        raise ModelError(
            f"{where}: has {quoted(odd[0])}{_more(odd)}, for which a {type(model).__name__} of this configuration has "
            f"no place; it would be left out, and the rest computes something else. Instead, {remedy}"
        )


def _missing(model: PreTrainedModel, missing: list[str], unexpected: Collection[str], *, whole: bool) -> str:
    """Say what is missing, and why, where that can be seen."""
    wrapper = _wrapper(model.base_model_prefix, set(missing), unexpected)
    if wrapper is not None:
        remedy = WRAPPERS.get(wrapper, "take it out of the names, load them, and call save_pretrained")
        return (
            f"the names of its weights have {quoted(f'{wrapper}.')} in them, and those of a {type(model).__name__} do "
            f"not, so that {missing[0]!r}{_more(missing)} would be random numbers; {remedy}"
        )
    what = "MODEL must be the whole fine-tuned model, head included" if whole else "only the head of a base may be new"
    saved, needed = model.config.architectures or (), type(model).__name__
    remedy = "Get the files again, or correct config.json"
    if whole and needed not in saved:
        remedy = (
            f"It was saved as a {', '.join(saved) or 'model without a head'}, and this task needs a {needed}: see to "
            "--task. If that is right, get the files again, or correct config.json"
        )
    return (
        f"its files have no {missing[0]!r}{_more(missing)}; transformers would put random numbers in its place, and "
        f"{what}. {remedy}"
    )


def _more(names: Collection[str]) -> str:
    return f" ({len(names)} such names in all)" if len(names) > 1 else ""


def _wrapper(prefix: str, missing: set[str], unexpected: Collection[str]) -> str | None:
    """Return the part of unexpected names without which at least half of the missing ones are there, if any."""
    for part in (*WRAPPERS, *sorted({name.split(".")[0] for name in unexpected})):
        bare = {f".{name}".replace(f".{part}.", ".")[1:] for name in unexpected}
        if 2 * len(missing & (bare | {f"{prefix}.{name}" for name in bare})) >= len(missing):
            return part
    return None


def _of_the_model(model: PreTrainedModel, unexpected: Iterable[str], *, whole: bool) -> Iterable[str]:
    """Yield the unexpected names that may mean that the model computes something else than its files did.

    A base may have anything that stands beside its body. What stands in one of its layers, in a layer more than it has,
    or in a module that has other parameters, belongs to it.
    """
    modules = dict(model.named_modules())
    for name in unexpected:
        if STALE.search(name):
            continue
        if whole:
            if ".pooler." not in f".{name}":  # some bodies are made without, and then nothing is computed from it
                yield name
            continue
        for path in (name, f"{model.base_model_prefix}.{name}"):
            parts = path.split(".")
            number = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts))
            layers = modules.get(".".join(parts[:number]))
            parent = modules.get(".".join(parts[:-1]))
            beside = parts[-1] in ("weight", "bias") and any(True for _ in (parent or nn.Module()).parameters(False))
            if isinstance(layers, nn.ModuleList) or beside:
                yield name
                break

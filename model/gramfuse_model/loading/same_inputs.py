"""Whether two tokenizers or image processors make the same tensors of an example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from gramfuse_model.digests import processor_document
from gramfuse_protocol.text import quoted

PADDING = {"pad_token", "padding_side", "model_max_length"} | {
    "clean_up_tokenization_spaces",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
}
"""What a tokenizer pads with and where, what each call says, and how tokens become a text again."""


def new_tokens(mine: Any, theirs: Any) -> Mapping[str, int]:
    """Return the tokens that one tokenizer has beside those of another, with their numbers, by number.

    Image processors have none.
    """
    if not isinstance(mine, PreTrainedTokenizerBase) or not isinstance(theirs, PreTrainedTokenizerBase):
        return {}
    known = theirs.get_vocab()
    new = ((token, index) for token, index in mine.get_vocab().items() if token not in known)
    return dict(sorted(new, key=lambda entry: (entry[1], entry[0])))


def other_inputs(mine: Any, theirs: Any) -> str | None:
    """Say what decides the tensors that are made of an example, and differs between two processors, if anything.

    Tokens that `mine` has beside those of `theirs` do not count. Nor does what comes with each call, and how it pads.
    Versions of transformers have classes of tokenizers of their own; where these differ, what both know is compared.
    """
    new = new_tokens(mine, theirs)
    moved = _moved(mine, theirs) if new else None
    if moved is not None:
        return moved
    one, other = processor_document(mine, without=new), processor_document(theirs)
    both = one["settings"].keys() & other["settings"].keys() if one["class"] != other["class"] else None
    for part in ("backend", "special", "settings"):
        here, there = one.get(part, {}), other.get(part, {})
        for key in sorted(here.keys() | there.keys()):
            counts = key not in PADDING and (part != "settings" or both is None or key in both)
            if counts and here.get(key) != there.get(key):
                return f"{part}.{key} is another"
    return None


def _moved(mine: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> str | None:
    """Say which is the first token of `theirs` that `mine` has not, or under another number, if there is one."""
    here = mine.get_vocab()
    for token, index in sorted(theirs.get_vocab().items(), key=lambda entry: (entry[1], entry[0])):
        if here.get(token) != index:
            found = f"has number {here[token]}" if token in here else "is not there"
            return f"token {quoted(token, 60)} of number {index} {found}"
    return None

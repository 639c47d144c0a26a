"""Compares two tokenizers or image processors: do they convert an example to the same tensors?"""

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
"""Settings that do not count: padding, settings that each call overrides, and decoding."""


def new_tokens(mine: Any, theirs: Any) -> Mapping[str, int]:
    """Return the tokens that `mine` has and `theirs` does not, with their ids, sorted by id.

    Image processors have none.
    """
    if not isinstance(mine, PreTrainedTokenizerBase) or not isinstance(theirs, PreTrainedTokenizerBase):
        return {}
    vocabulary = theirs.get_vocab()
    new = ((token, index) for token, index in mine.get_vocab().items() if token not in vocabulary)
    return dict(sorted(new, key=lambda entry: (entry[1], entry[0])))


def other_inputs(mine: Any, theirs: Any) -> str | None:
    """Describe the first difference between two processors that affects an example's tensors; None if there is none.

    Tokens that only `mine` has do not count, nor do padding and settings that each call overrides. Tokenizer classes
    differ between versions of transformers; if the classes differ, only settings that both have are compared.
    """
    new = new_tokens(mine, theirs)
    difference = _first_moved_token(mine, theirs) if new else None
    if difference is not None:
        return difference
    one, other = processor_document(mine, without=new), processor_document(theirs)
    common = one["settings"].keys() & other["settings"].keys() if one["class"] != other["class"] else None
    for part in ("backend", "special", "settings"):
        left, right = one.get(part, {}), other.get(part, {})
        for key in sorted(left.keys() | right.keys()):
            counts = key not in PADDING and (part != "settings" or common is None or key in common)
            if counts and left.get(key) != right.get(key):
                return f"{part}.{key} differs"
    return None


def _first_moved_token(mine: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> str | None:
    """Describe the first token of `theirs` that `mine` lacks or has under another id; None if there is none."""
    ids = mine.get_vocab()
    for token, index in sorted(theirs.get_vocab().items(), key=lambda entry: (entry[1], entry[0])):
        if ids.get(token) != index:
            problem = f"has id {ids[token]}" if token in ids else "is missing"
            return f"token {quoted(token, 60)} with id {index} {problem}"
    return None

"""What a tokenizer must be to a base model: it knows words, it pads, and it names no token that the model has not."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gramfuse_model.probing.public_text import PUBLIC_TEXT
from gramfuse_protocol.errors import ModelError
from gramfuse_protocol.text import quoted

SAVE = "save the tokenizer that the model was trained with, by its save_pretrained, into the same directory"


def check_files_of(tokenizer: PreTrainedTokenizerBase, directory: str) -> None:
    """Raise ModelError if a tokenizer was made without its files, to which all words are unknown."""
    names = {*tokenizer.vocab_files_names.values(), "tokenizer.json", "tekken.json"}
    files = {path.name for path in Path(directory).iterdir()}
    if tokenizer.vocab_files_names and not names & files and not any(name.endswith(".tiktoken") for name in files):
        raise ModelError(f"{directory}: has no tokenizer (one of {', '.join(sorted(names))}); {SAVE}")


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str) -> None:
    """Check that a tokenizer knows the public text, and that the model has a row for all that it makes of texts.

    Raises:
        ModelError: naming the token.
    """
    unknown = [_unknown(tokenizer, text) for text in PUBLIC_TEXT]
    share = sum(unknown) / len(unknown)
    if share > 0.5:
        raise ModelError(
            f"{directory}: to its tokenizer, {share:.0%} of plain English text is unknown; it is empty, or another "
            f"model's: {SAVE}"
        )
    table = token_table(model)
    beyond = [] if table is None else sorted(_tokens_from(tokenizer, table.num_embeddings).items(), key=lambda t: t[1])
    if beyond and table is not None:
        token, index = beyond[0]
        raise ModelError(
            f"{directory}: its tokenizer has {len(beyond)} tokens that the model has no embedding for, the first is "
            f"{quoted(token)} ({index}, of {table.num_embeddings:,} rows). Where tokens were added, load the model, "
            "call its resize_token_embeddings(len(tokenizer)), and save it; otherwise the tokenizer is another model's"
        )


def pad(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str) -> None:
    """Have a tokenizer without a token to pad with take that of the text's end, and the model know which it is.

    Raises:
        ModelError: if it has neither.
    """
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                f"{directory}: its tokenizer has no token to pad texts with (pad_token), nor one for their end "
                "(eos_token); name one that it has, as tokenizer.pad_token = '…', and save it with save_pretrained"
            )
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "pad_token_id", None) is None:  # a decoder finds the last token of a text by it
            config.pad_token_id = tokenizer.pad_token_id


def _unknown(tokenizer: PreTrainedTokenizerBase, text: str) -> float:
    """Return the share of a text's tokens that are unknown; 1.0 if there is none."""
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    unknown = _unknown_tokens(tokenizer)
    return sum(token in unknown for token in tokens) / len(tokens) if tokens else 1.0


def _unknown_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the numbers that stand for what is unknown: as a tokenizer declares it, and as its backend has it."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    token = getattr(model, "unk_token", None)
    found = {tokenizer.unk_token_id, getattr(model, "unk_id", None)}
    return {index for index in found | {tokenizer.get_vocab().get(token)} if index is not None}


def token_table(model: PreTrainedModel) -> nn.Embedding | None:
    """Return a model's table of tokens, if it has one; some compute what they take for a token."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return table if isinstance(table, nn.Embedding) else None


def _tokens_from(tokenizer: PreTrainedTokenizerBase, first: int) -> dict[str, int]:
    """Return the tokens from a number on that a text may be made into.

    Special tokens without a role are left out: texts have none, and some models come with one for images, say, that
    they have no row for.
    """
    roles = {str(token) for token in tokenizer.special_tokens_map.values() if isinstance(token, str)}
    idle = {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special and str(token) not in roles
    }
    return {token: index for token, index in tokenizer.get_vocab().items() if index >= first and index not in idle}

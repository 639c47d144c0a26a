"""Which rows a silo's sums were over, and with which silos, over all plans and for ever.

The difference of two sums is what one of them holds and the other does not. Where both hold the same rows of this silo
and differ by a few other silos, that is those silos' own part; where they differ by this silo, it is its own. So a silo
signs no sum whose survivors differ, by one silo up to one more than may collude, from an earlier sum over rows of which
some are the same. Survivors are known by their public keys, since a name may change from plan to plan.

A row is known by a salted hash of its input, without its label, case and white space. The salt never leaves the silo.
Differences of more than two sums are not looked at.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, TypeAdapter

from gramfuse_client.private import make_private_directory, write_private
from gramfuse_protocol.errors import RefusalError
from gramfuse_protocol.plan import Sha256
from gramfuse_protocol.transcript import Nonce, Sum

Rows = NDArray[np.uint64]
"""Salted hashes of rows: sorted, each once."""

Given = tuple[str | tuple[str, ...], str | None]
"""What an example's input is (`gramfuse_client.data.Examples.given`)."""

SALT_BYTES = 32


class Release(BaseModel):
    """One sum that this silo signed.

    Args:
        plan: its digest.
        round: of the plan.
        colluding: how many silos may collude under it.
        survivors: public keys of the silos in the sum, in hexadecimal, sorted.
        rows: what this silo's rows in the sum are kept by (`Releases.keep_rows`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    plan: Sha256
    round: int
    session: Nonce
    sum_of: Sum
    colluding: int
    survivors: tuple[Sha256, ...]
    rows: Sha256


_RELEASES = TypeAdapter(tuple[Release, ...])


class Releases:
    """The sums that a silo signed.

    Args:
        directory: of its own, in the silo's state.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def rows(self, given: Iterable[Given]) -> Rows:
        """Return the salted hashes of examples' inputs; the first call draws the salt.

        Raises:
            ValueError: if sums were signed, and the salt that their rows were hashed with is gone.
        """
        salt = self._salt()
        hashes = {hmac.digest(salt, _normal(one), "sha256")[:8] for one in given}
        return np.sort(np.frombuffer(b"".join(hashes), "<u8"))

    def read(self) -> tuple[Release, ...]:
        """Return all releases, the oldest first.

        Raises:
            ValueError: if the file is damaged.
        """
        try:
            return _RELEASES.validate_json(self._index.read_bytes())
        except FileNotFoundError:
            return ()

    def keep_rows(self, given: Iterable[Given]) -> str:
        """Keep the salted hashes of examples' inputs, and return the digest that they are kept by; raises as `rows`."""
        rows = self.rows(given).astype("<u8").tobytes()
        digest = hashlib.sha256(rows).hexdigest()
        if not self._rows(digest).exists():
            write_private(self._rows(digest), rows, durable=True)
        return digest

    def check(self, release: Release) -> None:
        """Raise RefusalError if the difference of a sum and an earlier one would be the part of a few silos.

        Raises:
            ValueError: if what is kept is damaged.
        """
        rows = self._load(release.rows)
        if problem := self.conflict(rows, release.sum_of, release.survivors, release.colluding):
            raise RefusalError(f"{self._index}: {problem}")

    def conflict(self, rows: Rows, sum_of: Sum, survivors: tuple[str, ...], colluding: int) -> str | None:
        """Say which earlier sum a sum could be subtracted from, and how many silos would be left; None if none.

        Args:
            rows: of this silo in the sum.
            survivors, colluding: as `Release` has them.

        Raises:
            ValueError: if what is kept is damaged.
        """
        for earlier in self.read():
            differing = len(set(earlier.survivors) ^ set(survivors))
            most = max(earlier.colluding, colluding) + 1
            if earlier.sum_of != sum_of or not 1 <= differing <= most:
                continue
            shared = len(np.intersect1d(self._load(earlier.rows), rows, assume_unique=True))
            if shared:
                return (
                    f"{shared} rows of this sum of {sum_of} were in a sum under plan {earlier.plan} already, and the "
                    f"silos differ by {differing}: the difference of the two sums is what those silos hold. Take the "
                    f"same silos as in that sum, or {most + 1} others at least, or rows that were in none; or set "
                    "'limits.differing-survivors = true', which gives that difference away"
                )
        return None

    def add(self, release: Release) -> None:
        """Keep a release, before anything is signed."""
        known = self.read()
        if release not in known:
            content = json.dumps([each.model_dump() for each in (*known, release)])
            write_private(self._index, content.encode(), durable=True)

    def clear(self) -> int:
        """Forget all releases, and return how many there were; of a record that cannot be read, 1."""
        try:
            count = len(self.read())
        except ValueError:
            count = 1
        for path in (self._index, *self.directory.glob("*.rows")):
            path.unlink(missing_ok=True)
        return count

    @property
    def _index(self) -> Path:
        return self.directory / "releases.json"

    def _rows(self, digest: str) -> Path:
        return self.directory / f"{digest}.rows"

    def _load(self, digest: str) -> Rows:
        try:
            content = self._rows(digest).read_bytes()
        except FileNotFoundError:
            content = b""
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(f"{self._rows(digest)}: is damaged or gone")
        return np.frombuffer(content, "<u8")

    def _salt(self) -> bytes:
        path = self.directory / "salt"
        if not path.exists():
            if self._index.exists():
                raise ValueError(f"{path}: is gone, so rows of earlier sums cannot be told any more")
            make_private_directory(self.directory)
            write_private(path, secrets.token_bytes(SALT_BYTES), durable=True)
        salt = path.read_bytes()
        if len(salt) != SALT_BYTES:
            raise ValueError(f"{path}: is damaged")
        return salt


def _normal(given: Given) -> bytes:
    """Return what of an input stays the same when only its case and white space change."""
    text, pair = given
    parts = [text if isinstance(text, str) else " ".join(text), pair or ""]
    return json.dumps([" ".join(part.casefold().split()) for part in parts]).encode()

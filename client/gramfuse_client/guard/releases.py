"""Which rows a silo's sums were over, and with which silos, over all plans and for ever.

The difference of two sums is what one of them holds and the other does not. Where both hold the same rows of this silo
and differ by a few other silos, that is those silos' own part; where they differ by this silo, it is its own. So a silo
signs no sum whose survivors differ, by one silo up to one more than may collude, from an earlier sum over rows of which
some are the same. A silo is the same if its public key is, or else its name: either may change from plan to plan. A
silo of which a plan says something else (its labels, its task) differs too. Over the same survivors, both plans have to
read rows in the same way: a length that only one silo's texts exceed, raised, makes the difference that silo's own.

A row is known by salted hashes of its texts, each without its label, case and white space. The salt never leaves the
silo. Differences of more than two sums are not looked at.
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

from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.plan_sections import Name, Sha256
from gramfuse_protocol.errors import RefusalError
from gramfuse_protocol.files import make_private_directory, write_private
from gramfuse_protocol.secure_sum.statements import Nonce, Sum

Rows = NDArray[np.uint64]
"""Salted hashes of rows: sorted, each once."""

Given = tuple[str | tuple[str, ...], str | None]
"""What an example's input is (`gramfuse_client.data.examples.Examples.given`)."""

SALT_BYTES = 32


class Survivor(BaseModel):
    """One silo of a sum: its name and public key, and a digest of what the plan says of it alone."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Name
    key: Sha256
    terms: Sha256


class Cohort(BaseModel):
    """The silos of a sum, and the plan that they made it under.

    Args:
        plan: its digest.
        reading: digest of what decides which rows of the data count, and how (`Plan.reading`).
        colluding: how many silos may collude.
        own: this silo, which is in the sum.
        others: the other silos, in roster order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    plan: Sha256
    reading: Sha256
    colluding: int
    own: Survivor
    others: tuple[Survivor, ...]

    @classmethod
    def of(cls, plan: Plan, own: str, survivors: Iterable[str]) -> Cohort:
        """Return the cohort of a plan's silos, of which one is this one; raises PlanError for silos without keys."""
        keys, among = plan.roster.keys, {own, *survivors}
        silos = {
            name: Survivor(name=name, key=keys[name].hex(), terms=plan.terms_of(name))
            for name in plan.names
            if name in among
        }
        return cls(
            plan=plan.digest,
            reading=plan.reading,
            colluding=plan.privacy.colluding,
            own=silos.pop(own),
            others=tuple(silos.values()),
        )

    def differing(self, other: Cohort) -> int:
        """Return by how many silos two sums of this silo's differ."""
        count, ours, theirs = int(self.own.terms != other.own.terms), list(self.others), list(other.others)
        for mark in ("key", "name"):
            there = {getattr(silo, mark): silo for silo in theirs}
            for silo in tuple(ours):
                if same := there.get(getattr(silo, mark)):
                    ours.remove(silo)
                    theirs.remove(same)
                    count += silo.terms != same.terms
        return count + len(ours) + len(theirs)


class Release(BaseModel):
    """One sum that this silo signed.

    Args:
        round: of the plan.
        cohort: whose sum it is, and under which plan.
        rows: what this silo's rows in the sum are kept by (`Releases.keep_rows`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    round: int
    session: Nonce
    sum_of: Sum
    cohort: Cohort
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
        hashes = {hmac.digest(salt, text, "sha256")[:8] for one in given for text in _normal(one)}
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
        if problem := self.conflict(rows, release.sum_of, release.cohort):
            raise RefusalError(f"{self._index}: {problem}")

    def conflict(self, rows: Rows, sum_of: Sum, cohort: Cohort) -> str | None:
        """Say which earlier sum a sum could be subtracted from, and how many silos would be left; None if none.

        Args:
            rows: of this silo in the sum.
            cohort: whose sum it is.

        Raises:
            ValueError: if what is kept is damaged.
        """
        for earlier in self.read():
            differing = cohort.differing(earlier.cohort)
            most = max(earlier.cohort.colluding, cohort.colluding) + 1
            read_otherwise = differing == 0 and cohort.reading != earlier.cohort.reading
            if earlier.sum_of != sum_of or not (1 <= differing <= most or read_otherwise):
                continue
            shared = len(np.intersect1d(self._load(earlier.rows), rows, assume_unique=True))
            if shared:
                problem = (
                    "the silos are the same, but the plan reads rows in another way ([model], [[task]], "
                    "'merge.tokens', 'training.batch-size' or 'training.seed'): where that changes one silo's rows "
                    "only, the difference of the two sums is that silo's own. Leave these keys as they were"
                    if read_otherwise
                    else f"the silos, or what the plan says of each, differ by {differing}: the difference of the two "
                    f"sums is what those silos hold. Take the same silos as in that sum, or {most + 1} others at least"
                )
                return (
                    f"{shared} texts of this sum of {sum_of} were in a sum under plan {earlier.cohort.plan} already, "
                    f"and {problem}, or rows that were in none; or set 'limits.differing-survivors = true', which "
                    "gives that difference away"
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


def _normal(given: Given) -> list[bytes]:
    """Return of each text of an input what stays the same when only its case and white space change."""
    text, pair = given
    texts = [text if isinstance(text, str) else " ".join(text), *([] if pair is None else [pair])]
    return [" ".join(text.casefold().split()).encode("utf-8", "surrogatepass") for text in texts]

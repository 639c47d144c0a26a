"""Remembers, across all plans and permanently, which rows were in which of a silo's sums, and with which silos.

Anyone who has two sums can subtract them. If both contain the same rows of this silo and differ by a few other silos,
the difference is those silos' own contribution; if they differ by this silo, it is its own. So a silo refuses to sign a
sum that shares rows with an earlier sum if their survivors differ by at least one silo, and at most one more than may
collude. Two silos are the same if their public keys are, or else their names; either can change from plan to plan. A
silo whose terms differ between the plans (its labels, its task) counts as a difference too. If the survivors are the
same, both plans must read rows in the same way. For example, if only one silo has texts longer than `max-length`, then
raising it makes the difference that silo's own.

A row is identified by salted hashes of its texts, ignoring label, case and white space. The salt never leaves the silo.
Differences of more than two sums are not checked.
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
from pydantic import TypeAdapter

from gramfuse_client.data.alike import normalised
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.plan_sections import Name, Sha256
from gramfuse_protocol.contract.stages import Subject, subtractable
from gramfuse_protocol.errors import RefusalError
from gramfuse_protocol.files import make_private_directory, write_private
from gramfuse_protocol.frozen import Frozen
from gramfuse_protocol.secure_sum.statements import Nonce

RowHashes = NDArray[np.uint64]
"""Salted hashes of rows: sorted and unique."""

InputKey = tuple[str | tuple[str, ...], str | None]
"""The key of an example's input (`gramfuse_client.data.examples.Examples.input_keys`)."""

SALT_BYTES = 32


class Survivor(Frozen):
    """One silo of a sum: its name, its public key, and a digest of its terms in the plan."""

    name: Name
    key: Sha256
    terms: Sha256


class Cohort(Frozen):
    """The silos of a sum, and their plan.

    Args:
        plan: the plan's digest.
        reading: digest of the settings that determine which rows are used, and how (`Plan.reading`).
        colluding: number of silos that may collude.
        least: of the sums of a head, this silo's `limits.minimum-label-examples`, which decides on rows too; else 0.
        silo: this silo, which is in the sum.
        others: the other silos, in roster order.
    """

    plan: Sha256
    reading: Sha256
    colluding: int
    least: int = 0
    silo: Survivor
    others: tuple[Survivor, ...]

    @classmethod
    def of(cls, plan: Plan, silo: str, survivors: Iterable[str], *, least: int = 0) -> Cohort:
        """Return the cohort of a plan's survivors; raise PlanError if a silo has no key.

        Args:
            silo: this silo's name.
            least: as of the cohort.
        """
        keys, members = plan.roster.keys, {silo, *survivors}
        silos = {
            name: Survivor(name=name, key=keys[name].hex(), terms=plan.terms_of(name))
            for name in plan.names
            if name in members
        }
        return cls(
            plan=plan.digest,
            reading=plan.reading,
            colluding=plan.privacy.colluding,
            least=least,
            silo=silos.pop(silo),
            others=tuple(silos.values()),
        )

    def reads_as(self, other: Cohort) -> bool:
        """Return whether both sums read this silo's rows in the same way."""
        return self.reading == other.reading and (0 in (self.least, other.least) or self.least == other.least)

    def differing(self, other: Cohort) -> int:
        """Return by how many silos two sums of this silo differ."""
        count, ours, theirs = int(self.silo.terms != other.silo.terms), list(self.others), list(other.others)
        for attribute in ("key", "name"):
            candidates = {getattr(silo, attribute): silo for silo in theirs}
            for silo in tuple(ours):
                if same := candidates.get(getattr(silo, attribute)):
                    ours.remove(silo)
                    theirs.remove(same)
                    count += silo.terms != same.terms
        return count + len(ours) + len(theirs)


class Release(Frozen):
    """One sum that this silo signed.

    Args:
        round: the session's number in the run.
        sum_of: what the sum is about.
        cohort: the silos in the sum, and their plan.
        rows: digest of this silo's rows in the sum (`Releases.keep_rows`).
    """

    round: int
    session: Nonce
    sum_of: Subject
    cohort: Cohort
    rows: Sha256


_RELEASES = TypeAdapter(tuple[Release, ...])


class Releases:
    """The sums that a silo signed.

    Args:
        directory: its own directory in the silo's state.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def rows(self, inputs: Iterable[InputKey]) -> RowHashes:
        """Return the salted hashes of examples' inputs. The first call generates the salt.

        Raises:
            ValueError: if the salt is missing although sums were signed.
        """
        salt = self._salt()
        hashes = {hmac.digest(salt, text, "sha256")[:8] for key in inputs for text in _normalised(key)}
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

    def keep_rows(self, inputs: Iterable[InputKey]) -> str:
        """Store the salted hashes of examples' inputs, and return their digest; raise what `rows` raises."""
        rows = self.rows(inputs).astype("<u8").tobytes()
        digest = hashlib.sha256(rows).hexdigest()
        if not self._rows(digest).exists():
            write_private(self._rows(digest), rows, durable=True)
        return digest

    def check(self, release: Release) -> None:
        """Raise RefusalError if a sum minus an earlier one would give the contribution of a few silos.

        Raises:
            ValueError: if a stored file is damaged.
        """
        rows = self._load(release.rows)
        if problem := self.conflict(rows, release.sum_of, release.cohort):
            raise RefusalError(f"{self._index}: {problem}")

    def conflict(self, rows: RowHashes, sum_of: Subject, cohort: Cohort) -> str | None:
        """Describe an earlier sum that conflicts with a new one; None if there is none.

        Args:
            rows: this silo's rows in the new sum.
            cohort: the silos in the new sum.

        Raises:
            ValueError: if a stored file is damaged.
        """
        for earlier in self.read():
            differing = cohort.differing(earlier.cohort)
            most = max(earlier.cohort.colluding, cohort.colluding) + 1
            read_differently = differing == 0 and not cohort.reads_as(earlier.cohort)
            if not subtractable(earlier.sum_of, sum_of) or not (1 <= differing <= most or read_differently):
                continue
            shared = len(np.intersect1d(self._load(earlier.rows), rows, assume_unique=True))
            if shared:
                problem = (
                    "the silos are the same, but rows are read differently ([model], [[task]], 'merge.tokens', "
                    "'training.batch-size' or 'training.seed' of the plan, or this silo's "
                    "'limits.minimum-label-examples'): if that changes only one silo's rows, the difference of the two "
                    "sums is that silo's own contribution. Keep the earlier values of these keys"
                    if read_differently
                    else f"the silos, or their terms in the plan, differ by {differing}: the difference of the two "
                    "sums is the contribution of those silos. Use the same silos as in that sum, or at least "
                    f"{most + 1} others"
                )
                return (
                    f"{shared} texts of this sum of {sum_of} were already in a sum under plan {earlier.cohort.plan}, "
                    f"and {problem}, or use rows that were in no sum; or set 'limits.differing-survivors = true', "
                    "which discloses that difference"
                )
        return None

    def add(self, release: Release) -> None:
        """Store a release. Call this before signing."""
        releases = self.read()
        if release not in releases:
            content = json.dumps([each.model_dump() for each in (*releases, release)])
            write_private(self._index, content.encode(), durable=True)

    def clear(self) -> int:
        """Forget all releases, and return how many there were; 1 if the record cannot be read."""
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

    def _load(self, digest: str) -> RowHashes:
        try:
            content = self._rows(digest).read_bytes()
        except FileNotFoundError:
            content = b""
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(f"{self._rows(digest)}: is damaged or missing")
        return np.frombuffer(content, "<u8")

    def _salt(self) -> bytes:
        path = self.directory / "salt"
        if not path.exists():
            if self._index.exists():
                raise ValueError(f"{path}: is missing, so rows of earlier sums cannot be recognised")
            make_private_directory(self.directory)
            write_private(path, secrets.token_bytes(SALT_BYTES), durable=True)
        salt = path.read_bytes()
        if len(salt) != SALT_BYTES:
            raise ValueError(f"{path}: is damaged")
        return salt


def _normalised(key: InputKey) -> list[bytes]:
    """Return each text of an input, with case folded and white space collapsed."""
    text, pair = key
    texts = [text if isinstance(text, str) else " ".join(text), *([] if pair is None else [pair])]
    return [normalised(text).encode("utf-8", "surrogatepass") for text in texts]

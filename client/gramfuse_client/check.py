"""A silo's dry run: what keeps it from taking part under a plan, and what would leave it if it did.

Nothing is trained, nothing is written, and nothing of the silo's is sent: the coordinator gets a TLS handshake and a
few empty requests.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import math
import os
import shutil
import socket
import ssl
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
from cryptography import x509

from gramfuse_client import policy
from gramfuse_client.data import Examples, load
from gramfuse_client.ledger import Head, Ledger
from gramfuse_client.silo import Silo
from gramfuse_client.state import Contributed, State
from gramfuse_protocol.canonical import canonical_json
from gramfuse_protocol.errors import DataError, GramfuseError, LedgerError, ModelError, PlanError, RefusalError
from gramfuse_protocol.keys import KEY_BYTES, SIGNATURE_BYTES
from gramfuse_protocol.layout import ITEM_BYTES, PIECE_BYTES, Block, Layout
from gramfuse_protocol.messages import (
    EvaluateReply,
    FinishReply,
    JoinReply,
    KeysReply,
    MaskedReply,
    Message,
    SharesReply,
    SurvivorsReply,
    TrainReply,
    UnmaskReply,
    UploadReply,
)
from gramfuse_protocol.metrics import sums_shape
from gramfuse_protocol.plan import Plan
from gramfuse_protocol.roster import tolerated
from gramfuse_protocol.scales import MOST_EXAMPLES
from gramfuse_protocol.secure_sum import SEALED_BYTES
from gramfuse_protocol.shares import SHARE_BYTES
from gramfuse_protocol.structure import parse_structure
from gramfuse_protocol.transcript import SUMS, Advert, Sum
from gramfuse_protocol.wire import DTYPES

if TYPE_CHECKING:
    from gramfuse_model.base import Base

Progress = Callable[[str], None]
"""Called with what is done next, in words."""

STEP_SECONDS = 5.0
"""Longest wait for one step of the connection."""
CONNECTION_SECONDS = 30.0
"""Longest wait for all of them, and for the host's name to be found."""

AHEAD = timedelta(seconds=5)
"""Flower refuses what is signed further in the future than this."""
APART = timedelta(seconds=60)
"""Flower refuses what was signed 300 s ago; a clock that is off by a fifth of that is not kept."""
EARLIEST = datetime(2026, 1, 1, tzinfo=UTC)
"""Before this there was no gramfuse."""
EXPIRY_NOTICE = timedelta(days=30)

ROOM_BYTES = 64 * 2**20
"""Room on the disk for the session, the ledger and the layout."""
RUNTIME_BYTES = 2**30
"""Memory of Python, torch and Flower, and of one piece on its way out."""
TEXT_BYTES = 16
"""Memory for each character of an example, which is tokenised into Python's lists."""

FLEET = "/v1/fleet/"
NOTHING = "/v1/fleet/nothing"
"""A call that Flower does not have: the proxy lets it through, and what is behind it says so."""
HIDDEN = ("/v1/control/", "/v1/control/start-run", "/v1/runtime/acquire-task")
"""What a silo must not be able to reach. Flower answers 404 to the first of them too, and 405 to the others."""

REMOTE = ("connection", "certificate", "SuperLink", "control API", "coordinator's clock")
"""What is looked at from here, in order."""
OPERATOR, COORDINATOR = "the coordinator's operator", "the coordinator"
EXPIRED, NOT_YET, OTHER_HOST, OTHER_ADDRESS = 10, 9, 62, 64
"""OpenSSL's X509_V_ERR_CERT_HAS_EXPIRED and the like."""
SET_CLOCK = "have this machine's clock kept, for instance: timedatectl set-ntp true"

METRICS = ("none", "sum", "silo")
"""From the least that may be shown of a silo's metrics to the most."""

WORDS = {
    "every message": "has the plan's digest, the session's number and this silo's name, beside what it says",
    "Gram matrix": "for each pair of features of what enters a layer, the mean of their product over the training "
    "tokens: one number for all tokens together",
    "change": "a parameter's value after fine-tuning, less its value in the base model",
    "masked": "a random number is added to each number; they cancel when the vectors of all silos in the sum are added",
}

CANDIDATES = ("simple", "regmean")
"""The models that a run measures: the simple average and the merged one."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        subject: in a word or two.
        state: `skipped` if it could not be looked at, or was not to be.
        what: what was found.
        remedy: what to do about it, a command or an edit where there is one; with `ok` it is good to know, no more.
    """

    subject: str
    state: Literal["ok", "problem", "skipped"]
    what: str
    remedy: str = ""


@dataclass(frozen=True)
class Part:
    """One array, or value, of a message.

    Args:
        dtype: numpy's name; "bytes" for keys and the like, "count" for a number in the header.
        shape: of an array; (bytes,) of bytes, () of a number.
        bytes: as an array leaves; bytes and numbers leave as text, which takes more.
        what: what it says.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    what: str


@dataclass(frozen=True)
class Departure:
    """One message of a run, or several of one kind, that would leave.

    Args:
        phase: as the ledger names it.
        what: what it says, in words.
        form: how its content can be read, in the ledger's words.
        bytes: of header and arrays, as the ledger counts them; None for what Flower itself says.
        to: who gets it.
        readers: who can read its content.
        parts: all that it carries, but for the header's names and numbers.
    """

    phase: str
    what: str
    form: str
    bytes: int | None
    to: str
    readers: str
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Leaving:
    """All that would leave in one run.

    Args:
        secure: whether contributions are masked.
        departures: in the order of the protocol.
        claims: who can learn what, and on which condition.
        stays: what does not leave.
        words: what the words mean that are used for what leaves.
    """

    secure: bool
    departures: tuple[Departure, ...]
    claims: tuple[str, ...]
    stays: tuple[str, ...]
    words: Mapping[str, str]

    @property
    def bytes(self) -> int:
        """Of all messages."""
        return sum(departure.bytes or 0 for departure in self.departures)


@dataclass(frozen=True)
class Report:
    """What a check came to.

    Args:
        file: the silo file.
        silo: the silo's name; empty if the file cannot be read.
        plan: name, version, digest and path of the plan; empty if there is none.
        leaving: None if there is no plan or no layout.
    """

    file: str
    silo: str
    plan: Mapping[str, Any]
    findings: tuple[Finding, ...]
    leaving: Leaving | None

    @property
    def problems(self) -> tuple[Finding, ...]:
        """What keeps the silo from taking part."""
        return tuple(finding for finding in self.findings if finding.state == "problem")


def check(
    path: Path,
    plan: Path | None = None,
    *,
    offline: bool = False,
    now: datetime | None = None,
    progress: Progress = lambda line: None,
) -> Report:
    """Look at all that a silo needs for a plan.

    Args:
        path: the silo file.
        plan: the locked plan, or the directory it is in; by default one that the silo joined before.
        offline: leave the coordinator alone.
        now: by the silo's own clock, in its own time zone; the present by default.
    """
    found = Findings()
    try:
        silo = Silo.read(path)
    except PlanError as error:
        found.problem("silo file", str(error), f"correct {path}")
        return Report(str(path), "", {}, found.all, None)
    found.ok("silo file", f"{path}, of silo {silo.name}")
    moment = now or datetime.now().astimezone()
    available = _available_memory()
    given = _given(found, silo, plan)
    if given is not None:
        _check_policy(found, silo, given, moment)
    _check_identity(found, silo, given)
    _check_node_key(found, silo, given)
    if given is not None:
        _check_nothing_missed(found, silo, given.plan)
    _check_state(found, silo)
    head = _check_ledger(found, silo)
    device = _check_device(found, silo)
    layout = None
    if given is not None:
        progress("reading the data")
        examples = _check_data(found, silo, given.plan, offline)
        progress("reading the base model, and deriving the layout from it; this takes some seconds")
        base = _check_base(found, silo, given.plan)
        layout = _check_layout(found, given, base)
        if layout is not None:
            _check_size(found, silo, given.plan, layout)
            _check_disk(found, silo, given.plan, layout)
        if layout is not None and base is not None:
            _check_memory(found, given.plan, layout, base, examples, device, available)
    _check_own_clock(found, moment, head)
    _check_coordinator(found, silo, offline, progress)
    leaving = leaves(silo.name, given.plan, layout) if given is not None and layout is not None else None
    return Report(str(path), silo.name, given.about if given is not None else {}, found.all, leaving)


class Findings:
    """What was found so far."""

    def __init__(self) -> None:
        self._all: list[Finding] = []

    @property
    def all(self) -> tuple[Finding, ...]:
        """All of it, in order."""
        return tuple(self._all)

    def ok(self, subject: str, what: str, notice: str = "") -> None:
        """Note that something is as it must be."""
        self._all.append(Finding(subject, "ok", what, notice))

    def problem(self, subject: str, what: str, remedy: str) -> None:
        """Note what keeps the silo from taking part."""
        self._all.append(Finding(subject, "problem", what, remedy))

    def skip(self, subject: str, why: str) -> None:
        """Note what was not looked at."""
        self._all.append(Finding(subject, "skipped", why))

    def extend(self, findings: Iterable[Finding]) -> None:
        """Take over what was found elsewhere."""
        self._all.extend(findings)

    def error(self, subject: str, error: GramfuseError, remedy: str = "") -> None:
        """Note an error as a problem: what comes after the first semicolon of its message is what to do."""
        what, _, own = str(error).partition("; ")
        self.problem(subject, what, "\n".join(filter(None, (own, remedy))))


# The plan, and what the silo file says of it


@dataclass(frozen=True)
class Given:
    """The plan that the check is about, and the layout that came with it."""

    path: Path
    plan: Plan
    layout: Layout | None

    @property
    def about(self) -> dict[str, Any]:
        """The plan in a few words."""
        header = self.plan.plan
        return {"name": header.name, "version": header.version, "digest": self.plan.digest, "path": str(self.path)}


def _given(found: Findings, silo: Silo, where: Path | None) -> Given | None:
    others = ""
    if where is not None:
        path = where / "plan.toml" if where.is_dir() else where
    else:
        joined = _joined(silo)
        if not joined:
            found.problem(
                "plan",
                "this silo joined no plan so far, and none was named",
                "get the locked plan (plan.toml and layout.json) from its author, and name it:\n"
                f"gramfuse silo check {silo.path} --plan PLAN_DIRECTORY",
            )
            return None
        path = joined[0]
        if joined[1:]:
            others = f"; {len(joined) - 1} more were joined before, name one with --plan to check it"
    try:
        plan = Plan.read(path)
        layout = Layout.read(path.parent / "layout.json") if (path.parent / "layout.json").exists() else None
    except PlanError as error:
        found.problem("plan", str(error), "get plan.toml and layout.json from the plan's author again")
        return None
    about = f"{plan.plan.name}, version {plan.plan.version}, from {path}{others}\ndigest {plan.digest}"
    if plan.locked:
        found.ok("plan", about)
    else:
        remedy = f"its author runs: gramfuse plan lock {path.parent}"
        found.problem("plan", f"is not locked, so base model and layout are not pinned: {about}", remedy)
    return Given(path, plan, layout)


def _joined(silo: Silo) -> list[Path]:
    """Return the plans that were joined, the one to check first: approved before others, then the newest."""
    paths = [path for path in silo.state.glob("*/plan.toml") if len(path.parent.name) == 64]
    return sorted(paths, key=lambda p: (p.parent.name in silo.file.approved, p.stat().st_mtime), reverse=True)


def _check_policy(found: Findings, silo: Silo, given: Given, moment: datetime) -> None:
    """Look at each rule of `gramfuse_client.policy` by itself, so that all that stands in the way is named."""
    plan, limits = given.plan, silo.file.limits
    secure = plan.privacy.secure_aggregation
    if not plan.locked:
        found.skip("approval", "a plan has its digest when it is locked")
    elif plan.digest in silo.file.approved:
        found.ok("approval", f"{silo.path} lists the plan's digest in 'approved'")
    else:
        digests = ", ".join(f'"{digest}"' for digest in (*silo.file.approved, plan.digest))
        found.problem(
            "approval",
            f"{silo.path} does not list the plan's digest in 'approved'",
            f"read the plan: gramfuse plan show {given.path.parent}\nif you agree with it, have this line in "
            f"{silo.path}, above [data]:\napproved = [{digests}]",
        )
    keyless = [entry.name for entry in plan.silo if secure and entry.public_key is None and entry.name != silo.name]
    if silo.name in plan.names and not keyless:
        others = [name for name in plan.names if name != silo.name]
        found.ok("roster", f"{silo.name}, with {', '.join(others[:8])}{', …' if others[8:] else ''}")
    elif keyless:
        found.problem(
            "roster",
            f"has no public key for {', '.join(keyless)}",
            "each of them runs gramfuse silo keygen, its key goes into the plan, and the plan is locked again",
        )
    else:
        found.problem(
            "roster",
            f"'name' in {silo.path} is {silo.name!r}; the plan's roster names {', '.join(plan.names)}",
            f"correct 'name' in {silo.path}, or have this silo added to the plan, which is locked again then",
        )
    if secure:
        found.ok("uploads", "masked")
    elif limits.open_uploads:
        found.ok("uploads", "open, as 'limits.open-uploads' allows: the coordinator can read what this silo uploads")
    else:
        found.problem(
            "uploads",
            "the plan has statistics leave in the clear (privacy.secure-aggregation = false), and "
            f"'limits.open-uploads' is false in {silo.path}",
            "ask for a plan with secure aggregation; only if the coordinator may read this silo's own statistics and "
            "weights, write under [limits]:\nopen-uploads = true",
        )
    asked, allowed = plan.privacy.metrics, limits.metrics
    if METRICS.index(asked) <= METRICS.index(allowed):
        said = {"none": "none leave", "sum": "shown as a sum over silos only", "silo": "shown silo by silo"}
        also = "; the coordinator can read this silo's own" if asked == "sum" and not secure else ""
        found.ok("metrics", f"{said[asked]}{also}")
    else:
        found.problem(
            "metrics",
            f"the plan has privacy.metrics = {asked!r}, and {silo.path} allows {allowed!r} at most",
            f'ask for a plan that shows less; only if so much may be shown, write under [limits]:\nmetrics = "{asked}"',
        )
    try:
        policy.check_hours(silo, moment)
        found.ok("hours", f"trains {limits.train_hours}" if limits.train_hours else "trains at any hour")
    except RefusalError:
        now = f"it is {moment:%H:%M}, and this silo trains {limits.train_hours} only"
        found.ok("hours", now, "a run that starts now is refused; agree on a time")
    try:
        state = State(silo.state, plan.digest)
        policy.check_repeat(silo, state, "")
        found.ok(
            "repeat", "'limits.repeat-contributions' allows it" if state.contributed() else "the first under this plan"
        )
    except RefusalError as error:
        found.error("repeat", error)
    except OSError as error:
        found.skip("repeat", f"the state directory cannot be read: {error.strerror}")
    except ValueError:
        found.problem(
            "repeat",
            f"{silo.state / plan.digest / 'contributed.json'}: is damaged, or another version's",
            "look in the ledger whether this silo contributed under the plan, and agree on a new version of it if so:\n"
            f"gramfuse silo ledger show {silo.path}",
        )


def _check_nothing_missed(found: Findings, silo: Silo, plan: Plan) -> None:
    """Have the policy itself decide, should it know of something that was not looked at here."""
    try:
        policy.check_plan(silo, plan)
    except GramfuseError as error:
        if not any(finding.state == "problem" for finding in found.all):
            found.error("policy", error)


# Keys, state, ledger


def _check_identity(found: Findings, silo: Silo, given: Given | None) -> None:
    try:
        public = silo.identity().public.hex()
    except PlanError as error:
        found.error("identity", error)
        return
    about = f"{silo.identity_path}, readable by its owner only\npublic key {public}"
    roster = {} if given is None else {entry.name: entry.public_key for entry in given.plan.silo}
    named = roster.get(silo.name, public)
    if named == public or (named is None and given is not None and not given.plan.privacy.secure_aggregation):
        found.ok("identity", about)
        return
    found.problem(
        "identity",
        f"the plan's roster has {named or 'no public key'} for {silo.name}; {silo.identity_path} holds {public}",
        _put_into_plan(f'public-key = "{public}"'),
    )


def _check_node_key(found: Findings, silo: Silo, given: Given | None) -> None:
    try:
        line = silo.node_key()
    except PlanError as error:
        found.error("node key", error)
        return
    digest = base64.b64encode(hashlib.sha256(base64.b64decode(line.split()[1])).digest()).decode("ascii").rstrip("=")
    about = f"{silo.node_key_path}, readable by its owner only\nfingerprint SHA256:{digest}"
    roster = {} if given is None else {entry.name: entry.node_key for entry in given.plan.silo}
    named = roster.get(silo.name, line)
    if named == line:
        found.ok("node key", about)
        return
    has = "another key" if named else "no key"
    found.problem(
        "node key",
        f"the plan's roster has {has} for the connection of {silo.name}, so the coordinator would not know it; "
        f"{silo.node_key_path} holds SHA256:{digest}",
        _put_into_plan(f'node-key = "{line}"'),
    )


def _put_into_plan(line: str) -> str:
    return f"make sure that the file is the right one, and have its public half put into the plan, then locked:\n{line}"


def _check_state(found: Findings, silo: Silo) -> None:
    directory = silo.state.resolve()
    if not directory.exists():
        parent = _nearest(directory)
        if os.access(parent, os.W_OK | os.X_OK):
            found.ok("state", f"{directory} will be made with the first run; {parent} can be written")
        else:
            found.problem(
                "state",
                f"{directory} is not there, and this user cannot write {parent}",
                f"as a user who can: install -d -m 700 -o {os.geteuid()} {directory}",
            )
        return
    about = directory.stat()
    if not directory.is_dir():
        found.problem("state", f"{directory} is no directory", f"move it away, or name another 'state' in {silo.path}")
    elif about.st_mode & 0o077:
        found.problem(
            "state",
            f"{directory}: others on this machine have rights on it (mode {about.st_mode & 0o777:o}); it holds "
            "fine-tuned weights",
            f"chmod 700 {directory}",
        )
    elif not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        found.problem(
            "state",
            f"{directory}: this user cannot write there",
            f"run the silo as its owner (user {about.st_uid}), or: chown -R {os.geteuid()} {directory}",
        )
    else:
        found.ok("state", f"{directory}, for its owner only")


def _nearest(path: Path) -> Path:
    """Return the nearest directory above that is there."""
    return next(parent for parent in path.absolute().parents if parent.exists())


def _check_ledger(found: Findings, silo: Silo) -> Head | None:
    path, read = silo.ledger.resolve(), 0
    try:
        if not path.exists():
            Ledger(path, silo.name).verify()  # a ledger that is gone leaves its head behind
            found.ok("ledger", f"{path} begins with the first message")
            return None
        mode = path.stat().st_mode & 0o777
        if mode & 0o077:
            found.problem("ledger", f"{path}: others have rights on it (mode {mode:o})", f"chmod 600 {path}")
            return None
        head = Head()
        for line in Ledger(path, silo.name).lines():
            read += 1
            head = Head(line.number, line.digest, head.bytes + line.entry.bytes, head.first or line.time, line.time)
        found.ok("ledger", f"{head.number:,} lines hold together, last of {head.last or '-'}\nhead {head.digest}")
        return head
    except LedgerError as error:
        if _only_cut_short(path, read):
            found.ok("ledger", f"{read:,} lines hold together; the last was not finished, and its message never left")
            return None
        found.problem("ledger", str(error), "keep the ledger and its .head, and see docs/exit-codes/18.md")
    except OSError as error:
        found.problem("ledger", f"{path}: cannot be read: {error}", "run the check as the user who runs the silo")
    return None


def _only_cut_short(path: Path, read: int) -> bool:
    """Whether all lines were read but for one that the silo stopped in; it is cut off before the next is written."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return not content.endswith(b"\n") and content.count(b"\n") == read


# Data, base model, layout


def _check_data(found: Findings, silo: Silo, plan: Plan, offline: bool) -> Examples | None:
    source = silo.file.data.train
    if offline and source.startswith("hf:") and not (silo.directory / source[3:].partition("#")[0]).is_dir():
        found.skip("data", f"{source} is on the Hugging Face hub, and the check is offline")
        return None
    try:
        train, held_out = load(silo, plan.model)
    except DataError as error:
        found.error("data", error, f"correct the data, or [data] in {silo.path}")
        return None
    contributed = _contributed(silo, plan)
    most = MOST_EXAMPLES if plan.privacy.secure_aggregation and plan.merge.weighting == "examples" else None
    try:
        policy.check_examples(silo, len(train))
    except RefusalError as error:
        found.error("data", error, f"add data, or lower 'limits.minimum-examples' in {silo.path} knowingly")
        return train
    if contributed is not None and contributed.data != train.digest:
        found.problem(
            "data",
            "other data were contributed under this plan before; the difference of the sums would show what changed",
            "put the data back as they were, or agree on a new version of the plan",
        )
    elif most is not None and len(train) > most:
        found.problem(
            "data",
            f"{len(train):,} training examples are more than the {most:,} that a secure sum can weigh",
            "agree on a plan with merge.weighting = 'uniform'",
        )
    else:
        found.ok(
            "data",
            f"{len(train):,} training examples ({_counts(train, plan)}), {len(held_out):,} held out\n"
            + _what_leaves_of_counts(plan),
        )
    return train


def _counts(examples: Examples, plan: Plan) -> str:
    """Say how many examples each label has."""
    labels = plan.model.labels
    if not labels:
        return "targets are numbers"
    counts = Counter(examples.labels)
    said = [f"{labels[index]} {counts[index]:,}" for index in range(len(labels))]
    return ", ".join(said[:12]) + (f", and {len(said) - 12} more labels" if said[12:] else "")


def _what_leaves_of_counts(plan: Plan) -> str:
    if plan.privacy.secure_aggregation and plan.privacy.metrics != "silo":
        return "these numbers are shown to you only; they leave masked, to be read in the sum over the silos"
    training = "masked" if plan.privacy.secure_aggregation else "in the clear"
    if plan.privacy.metrics == "none":
        return f"how many training examples there are leaves {training}; the other numbers do not"
    return f"how many training examples there are leaves {training}; how many are held out, of each label, in the clear"


def _check_base(found: Findings, silo: Silo, plan: Plan) -> Base | None:
    import torch

    from gramfuse_model.base import load_base

    if silo.file.threads:
        torch.set_num_threads(silo.file.threads)  # as in a run
    remedy = f"get the files of whoever locked the plan, and name their directory above [data] in {silo.path}:\n"
    try:
        source = _local(silo.file.base or plan.model.base, silo.directory)
        base = load_base(plan, silo.directory, override=source)
    except ModelError as error:
        found.error("base model", error, f'{remedy}base = "DIRECTORY"')
        return None
    about = f"{source}, SHA-256 {base.sha256}"
    found.ok("base model", about if plan.model.sha256 else f"{about}; the plan names none yet")
    return base


def _local(base: str, directory: Path) -> str:
    """Return where a base model is on this machine; the check downloads nothing.

    Raises:
        ModelError: if it is not here.
    """
    from transformers.utils.hub import cached_file

    from gramfuse_model.base import locate

    source = locate(base, directory)
    if Path(source).is_dir():
        return source
    try:
        found = cached_file(source, "config.json", local_files_only=True)
    except OSError:
        found = None
    if found is None:
        raise ModelError(f"base {base!r} is on the Hugging Face hub and not on this machine; run: hf download {base}")
    return str(Path(found).parent)


def _check_layout(found: Findings, given: Given, base: Base | None) -> Layout | None:
    from gramfuse_model.tracing import plan_layout

    plan = given.plan
    if base is None:
        known = given.layout if given.layout is not None and given.layout.digest == plan.merge.layout else None
        found.skip(
            "layout",
            "it is derived from the base model" + ("; what follows is by the layout.json of the plan" if known else ""),
        )
        return known
    try:
        layout = plan_layout(plan, base, given.layout)
    except ModelError as error:
        hint = "" if given.layout else f"\nor put the author's layout.json beside {given.path}: rounding may differ"
        found.error("layout", error, hint.strip())
        return None
    found.ok("layout", f"derived here, digest {layout.digest}" + (", as in the plan" if plan.merge.layout else ""))
    return layout


def _contributed(silo: Silo, plan: Plan) -> Contributed | None:
    try:
        return State(silo.state, plan.digest).contributed()
    except (OSError, ValueError):
        return None  # a finding of its own


# This machine


def _check_size(found: Findings, silo: Silo, plan: Plan, layout: Layout) -> None:
    size, most = policy.contribution_bytes(plan, layout), silo.file.limits.maximum_bytes
    try:
        policy.check_bytes(silo, plan, layout)
        found.ok("size", f"a contribution has {size:,} bytes" + (f", of {most:,} that may leave" if most else ""))
    except RefusalError:
        found.problem(
            "size",
            f"a contribution has {size:,} bytes, and 'limits.maximum-bytes' is {most:,}",
            'ask for a plan that sends less, for instance merge.gram = { "*" = "block:128" }; or write under '
            f"[limits]:\nmaximum-bytes = {size}",
        )


def _check_disk(found: Findings, silo: Silo, plan: Plan, layout: Layout) -> None:
    masked = 8 * layout.sum_entries if plan.privacy.secure_aggregation else 0
    needed = 2 * layout.contribution_bytes + masked + ROOM_BYTES
    state = silo.state.resolve()
    where = state if state.exists() else _nearest(state)
    free = shutil.disk_usage(where).free
    kept = (
        f"statistics, with the fine-tuned weights in them, {_mb(layout.contribution_bytes)} and again while they are "
    )
    kept += "replaced" + (f"; masked vector {_mb(masked)}" if masked else "") + f"; {_mb(ROOM_BYTES)} for the rest"
    if free < needed:
        found.problem(
            "disk",
            f"{_mb(free)} are free at {where}, and a run may need {_mb(needed)}: {kept}",
            f"make room, or name a 'state' on another disk in {silo.path}",
        )
    else:
        found.ok("disk", f"{_mb(free)} free at {where}; a run may need {_mb(needed)} ({kept})")


def _check_memory(
    found: Findings, plan: Plan, layout: Layout, base: Base, examples: Examples | None, device: str, available: int
) -> None:
    training, measuring = memory(plan, layout, base, examples)
    if device == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info()
        enough = training <= free and measuring <= available
        room = f"{_mb(free)} of the GPU's and {_mb(available)} of this machine's are free"
    else:
        enough = max(training, measuring) <= available
        room = f"{_mb(available)} are free"
    about = f"fine-tuning takes about {_mb(training)}, measuring about {_mb(measuring)}; {room}"
    if enough:
        found.ok("memory", about)
    else:
        found.problem(
            "memory",
            about,
            "stop what else runs here; or ask for a plan with a smaller training.batch-size or model.max-length, or "
            'with smaller Gram matrices: merge.gram = { "*" = "block:128" }',
        )


def memory(plan: Plan, layout: Layout, base: Base, examples: Examples | None) -> tuple[int, int]:
    """Return the bytes that a silo holds at most, about, while it fine-tunes and while it measures.

    Fine-tuning: all parameters; of the trained ones a copy as they were, gradients and AdamW's two moments; what the
    layers keep for the backward pass. Measuring: all parameters; of the trained ones two copies; Gram matrices, square
    and in float64 (`gramfuse_client.gram`); the statistics, twice while they are written.
    """
    parameters = sum(tensor.numel() * tensor.element_size() for tensor in base.model.state_dict().values())
    trained = ITEM_BYTES * sum(delta.block.entries for delta in layout.deltas)
    rows = plan.training.batch_size * plan.model.max_length
    kept = 2 * ITEM_BYTES * rows * sum(group.d_in + group.d_out for group in layout.groups)
    squares = 8 * sum(count * width * width for group in layout.groups for _, count, width in group.blocks.parts)
    texts = 0 if examples is None else sum(map(len, examples.texts)) + sum(map(len, examples.pairs or ()))
    always = RUNTIME_BYTES + parameters + TEXT_BYTES * texts
    return always + 4 * trained + kept, always + 2 * trained + squares + 2 * layout.contribution_bytes


def _available_memory() -> int:
    """Return how much memory there is, also where a container may have only some of it."""
    free = int(psutil.virtual_memory().available)
    try:
        return min(free, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):
        return free


def _check_device(found: Findings, silo: Silo) -> str:
    import torch

    from gramfuse_client.finetune import choose_device

    asked, threads = silo.file.device, silo.file.threads
    try:
        device = choose_device(asked).type
    except PlanError as error:
        found.error("device", error, f'write in {silo.path}, above [data]:\ndevice = "auto"')
        return "cpu"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    used = threads or torch.get_num_threads()
    about = f"{device}" + (" (auto)" if asked == "auto" else "") + f", {used} threads on {cores} processors"
    found.ok("device", about, f"more threads than processors only slow down: threads = {cores}" if used > cores else "")
    return device


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.1f} GB"


# The coordinator


def _check_own_clock(found: Findings, moment: datetime, head: Head | None) -> None:
    last = datetime.fromisoformat(head.last) if head is not None and head.last else EARLIEST
    said = f"{moment:%Y-%m-%d %H:%M:%S %Z}"
    if moment < last:
        why = "before the last line of the ledger" if head is not None and head.last else "before gramfuse was there"
        found.problem("clock", f"it is {said} here, which is {why}", SET_CLOCK)
    else:
        found.ok("clock", said)


def _check_coordinator(found: Findings, silo: Silo, offline: bool, progress: Progress) -> None:
    """Look at the coordinator from here. It is over in time, whatever the other side does."""
    try:
        address = silo.coordinator.address
    except PlanError as error:
        found.error("coordinator", error)
        return
    context = _check_authority(found, silo)
    seen: list[Finding] = []
    done: list[Finding] = []
    why = "not looked at, as --offline says" if offline else "needs what comes before it"
    if context is not None and not offline:
        progress(f"connecting to {address}")
        host, _, port = address.rpartition(":")
        visit = _visit(silo, host.strip("[]"), int(port), context)
        # A name server can take longer than any time-out here, so all of it is given up after a while.
        thread = threading.Thread(target=lambda: seen.extend(visit), daemon=True)
        thread.start()
        thread.join(CONNECTION_SECONDS)
        done = [*seen]
        if thread.is_alive() and len(done) < len(REMOTE):
            what = f"{address}: it took more than {CONNECTION_SECONDS:.0f} s"
            done.append(
                Finding(REMOTE[len(done)], "problem", what, f"try again; ask {OPERATOR}, or who runs the network")
            )
    found.extend(done)
    for subject in REMOTE[len(done) :]:
        found.skip(subject, why)


def _check_authority(found: Findings, silo: Silo) -> ssl.SSLContext | None:
    """Return a context that trusts what Flower will trust here."""
    path, context = silo.ca_path, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cafile=path)
    except OSError as error:  # ssl's errors are among them
        why = "holds no certificate in PEM" if isinstance(error, ssl.SSLError) else error.strerror
        found.problem(
            "authority",
            f"{path}: {why}",
            "get ca.crt from the coordinator's operator, and compare its SHA-256 over another way",
        )
        return None
    digests = [hashlib.sha256(certificate).digest().hex(":").upper() for certificate in context.get_ca_certs(True)]
    found.ok("authority", "\n".join([str(path), *(f"SHA-256 {digest}" for digest in digests)]))
    return context


def _visit(silo: Silo, host: str, port: int, context: ssl.SSLContext) -> Iterator[Finding]:
    """Yield one finding for each of REMOTE, up to the first without which the next cannot be."""
    try:
        began = time.monotonic()
        connection = socket.create_connection((host, port), STEP_SECONDS)
    except (OSError, UnicodeError, OverflowError) as error:
        yield Finding("connection", "problem", *_unreachable(error, silo, host))
        return
    with connection:
        took = time.monotonic() - began
        yield Finding("connection", "ok", f"{host} port {port} answers, in {1000 * took:.0f} ms")
        try:
            with context.wrap_socket(connection, server_hostname=host) as secured:
                yield _certificate(secured)
        except ssl.SSLCertVerificationError as error:
            yield Finding("certificate", "problem", *_untrusted(error, silo, host, port))
            return
        except OSError as error:
            why = "no TLS is spoken there" if isinstance(error, ssl.SSLError) else "the TLS handshake was not finished"
            remedy = f"check the port of 'address' in {silo.path}; {OPERATOR} has to offer TLS there"
            yield Finding("certificate", "problem", f"{why}: {getattr(error, 'reason', None) or error}", remedy)
            return
    try:
        fleet = _ask(host, port, context, "POST", NOTHING)
        statuses = {path: _ask(host, port, context, "GET", path).status for path in HIDDEN}
    except (OSError, http.client.HTTPException) as error:
        what = f"does not answer in HTTP: {type(error).__name__} {error}".rstrip()
        yield Finding("SuperLink", "problem", what, f"{OPERATOR} has to see to it: gramfuse server start")
        return
    if fleet.status >= 500:
        what = f"the proxy answers, and nothing behind it (status {fleet.status})"
        yield Finding("SuperLink", "problem", what, f"{OPERATOR} has to start it: gramfuse server start")
    else:
        yield Finding("SuperLink", "ok", "answers")
    open_paths = [f"{path} (status {status})" for path, status in statuses.items() if status != 404]
    if open_paths:
        yield Finding(
            "control API",
            "problem",
            f"the coordinator lets this silo reach {', '.join(open_paths)}: whoever does can start runs, register "
            "silos and take tasks",
            f"{OPERATOR} must let {FLEET} through only, as gramfuse server start does; do not start this silo before",
        )
    else:
        yield Finding("control API", "ok", "out of this silo's reach")
    yield _apart(fleet)


def _unreachable(error: Exception, silo: Silo, host: str) -> tuple[str, str]:
    """Say why there is no connection, and what to do."""
    if isinstance(error, socket.gaierror):
        what, remedy = f"{host}: no such host: {error.strerror}", f"check 'address' in {silo.path}, and the name server"
    elif isinstance(error, TimeoutError):
        what = f"{host} gave no answer in {STEP_SECONDS:.0f} s"
        remedy = "have the firewalls between let it through, outwards from here"
    elif isinstance(error, ConnectionRefusedError):
        what = f"{host} refuses the connection: nothing listens on that port"
        remedy = f"check 'address' in {silo.path}; {OPERATOR} runs: gramfuse server start"
    else:
        what, remedy = (
            f"{host}: {getattr(error, 'strerror', None) or error}",
            f"check 'address' in {silo.path}, and the network",
        )
    if urllib.request.getproxies().get("https") and not urllib.request.proxy_bypass(host):
        remedy += "\n(HTTPS_PROXY is set here; Flower goes through that proxy, and this check does not)"
    return what, remedy


def _certificate(secured: ssl.SSLSocket) -> Finding:
    """Say what a certificate that is trusted is good for."""
    leaf = x509.load_der_x509_certificate(secured.getpeercert(True) or b"")
    left = leaf.not_valid_after_utc - datetime.now(UTC)
    what = f"for {', '.join(_names(leaf))}, until {leaf.not_valid_after_utc:%Y-%m-%d} ({secured.version()})"
    renew = f"{left.days} days are left; {OPERATOR} should renew it: gramfuse pki server DIR --host HOST --renew"
    return Finding("certificate", "ok", what, renew if left < EXPIRY_NOTICE else "")


def _untrusted(error: ssl.SSLCertVerificationError, silo: Silo, host: str, port: int) -> tuple[str, str]:
    """Say what is wrong with a certificate, and what to do."""
    leaf, code = _peer(host, port), error.verify_code
    if leaf is None:
        return f"is not to be trusted: {error.verify_message}", f"ask {OPERATOR}"
    begin, end = leaf.not_valid_before_utc, leaf.not_valid_after_utc
    if code in (EXPIRED, NOT_YET):
        if begin <= datetime.now(UTC) < end:
            return (
                f"the authority that signed it is not valid now, by this machine's clock ({error.verify_message})",
                f"{OPERATOR} has to make a new one: gramfuse pki init; each silo gets its ca.crt",
            )
        return (
            f"is valid from {begin:%Y-%m-%d} to {end:%Y-%m-%d} only, and here it is {datetime.now(UTC):%Y-%m-%d}",
            f"if the clock here is right, {OPERATOR} has to renew it: gramfuse pki server DIR --host {host} --renew",
        )
    if code in (OTHER_HOST, OTHER_ADDRESS):
        return (
            f"is not for {host}; it is for {', '.join(_names(leaf)) or 'nobody'}",
            f"write one of these names as 'address' in {silo.path}, or {OPERATOR} makes one for this name:\n"
            f"gramfuse pki server DIR --host {host} --renew",
        )
    return (
        f"was not signed by the authority in {silo.ca_path}, but by {leaf.issuer.rfc4514_string()} "
        f"({error.verify_message})",
        f"get ca.crt from {OPERATOR}, and compare its SHA-256 over another way. If they have another one, somebody is "
        "between you and them: do not go on",
    )


def _peer(host: str, port: int) -> x509.Certificate | None:
    """Return the certificate that a host shows, trusted or not; it is only read."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection((host, port), STEP_SECONDS) as connection,
            context.wrap_socket(connection, server_hostname=host) as secured,
        ):
            return x509.load_der_x509_certificate(secured.getpeercert(True) or b"")
    except (OSError, ValueError):
        return None


def _names(certificate: x509.Certificate) -> list[str]:
    """Return the hosts that a certificate is for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    return [str(name.value) for name in names]


@dataclass(frozen=True)
class _Answer:
    """An HTTP status and the Date that came with it; by this clock, when it was asked for and when it was there."""

    status: int
    date: str | None
    asked: datetime
    came: datetime


def _ask(host: str, port: int, context: ssl.SSLContext, method: str, path: str) -> _Answer:
    """Send a request without content, which changes nothing anywhere."""
    connection = http.client.HTTPSConnection(host, port, timeout=STEP_SECONDS, context=context)
    try:
        connection.connect()
        asked = datetime.now(UTC)
        connection.request(method, path)
        answer = connection.getresponse()
        return _Answer(answer.status, answer.headers["Date"], asked, datetime.now(UTC))
    finally:
        connection.close()


def _apart(answer: _Answer) -> Finding:
    """Compare this machine's clock with the coordinator's, which tells whole seconds."""
    subject = REMOTE[-1]
    try:
        date = parsedate_to_datetime(answer.date or "")
    except ValueError:
        return Finding(subject, "skipped", "the coordinator does not tell its time")
    theirs = date.astimezone(UTC) + timedelta(seconds=0.5)
    ours = answer.asked + (answer.came - answer.asked) / 2
    ahead, unsure = ours - theirs, (answer.came - answer.asked) / 2 + timedelta(seconds=0.5)
    seconds = abs(ahead).total_seconds()
    what = f"this clock is {seconds:.0f} s {'ahead of' if ahead > timedelta() else 'behind'} the coordinator's"
    if ahead <= AHEAD and -ahead <= APART:
        return Finding(subject, "ok", what if abs(ahead) > unsure + timedelta(seconds=1) else "the same as here")
    return Finding(
        subject,
        "problem",
        f"{what} ({ours:%Y-%m-%d %H:%M:%S} here, {theirs:%Y-%m-%d %H:%M:%S} there, UTC); Flower refuses what is signed "
        f"more than {AHEAD.seconds} s ahead or long ago",
        f"{SET_CLOCK}; if it is the coordinator's that is wrong, tell its operator",
    )


# What would leave


def leaves(silo: str, plan: Plan, layout: Layout) -> Leaving:
    """Return what one run has leave a silo, if all goes well and nobody is lost.

    Args:
        silo: its name.
        layout: the plan's.
    """
    secure = plan.privacy.secure_aggregation
    about: dict[str, Any] = {"plan": plan.digest, "session": "0" * 32, "silo": silo}
    first = (
        Departure(
            "connection",
            "that this silo is there, and from which address; signatures over the time of day, by its node key",
            "signature",
            None,
            "the coordinator's SuperLink, as long as the silo runs",
            f"{COORDINATOR}; the network sees address, times and amounts",
        ),
        _nothing(JoinReply(**about), "that it takes part"),
    )
    last = (
        _nothing(FinishReply(**about), "that it wiped what it kept for the session"),
        Departure(
            "any",
            "instead of any of these, that it declines: an error's name, and a reason that quotes no data",
            "reason",
            None,
            COORDINATOR,
            COORDINATOR,
        ),
    )
    middle = _masked_run(about, plan, layout) if secure else _open_run(about, plan, layout)
    words = {word: said for word, said in WORDS.items() if secure or word != "masked"}
    return Leaving(secure, (*first, *middle, *last), _claims(plan), _stays(plan, layout), words)


def _masked_run(about: Mapping[str, Any], plan: Plan, layout: Layout) -> Iterator[Departure]:
    others = [name for name in plan.names if name != about["silo"]]
    minimum, silos = plan.minimum_survivors, len(plan.names)
    sums = f"nobody: random words. Only the sum over at least {minimum} of the {silos} silos can be read"
    yield _nothing(TrainReply(**about), "that fine-tuning is done; no numbers")
    yield Departure(
        "keys",
        "the keys that it made for this session: one for shares, two for masks, two fingerprints of secrets, signed",
        "public keys",
        _size(KeysReply(**about, advert=_advert(about["silo"]))),
        f"{COORDINATOR}, and through it all other silos",
        "all of them; keys are there to be read",
        (
            _value("channel key", KEY_BYTES, "X25519, public"),
            *(_value(f"mask key of the {name}", KEY_BYTES, "X25519, public") for name in SUMS),
            *(_value(f"commitment of the {name}", KEY_BYTES, "SHA-256 of a secret") for name in SUMS),
            _value("signature", SIGNATURE_BYTES, "Ed25519, by this silo's identity"),
        ),
    )
    yield Departure(
        "shares",
        f"for each of the {len(others)} other silos, its shares of this silo's secrets, sealed for it",
        "sealed shares",
        _size(SharesReply(**about, sealed=dict.fromkeys(others, "00" * SEALED_BYTES))),
        f"{COORDINATOR}, who hands each to the silo that it is for",
        f"the silo that it is for; {plan.threshold} of {silos} shares give a secret back",
        tuple(_value(f"shares for {name}", SEALED_BYTES, "ChaCha20-Poly1305") for name in others),
    )
    parts = tuple(
        Part(block.name, "uint64", block.shape, 8 * block.entries, _says(block, layout)) for block in layout.sums
    )
    yield from _masked_sum("statistics", "its contribution", about, plan, layout.sum_entries, parts, sums)
    if plan.privacy.metrics == "none":
        return
    if plan.privacy.metrics == "silo":
        yield _results(about, plan)
        return
    measured = [EvaluateReply(**about, candidate=name) for name in CANDIDATES]
    yield Departure(
        "evaluate",
        f"that it measured the {len(CANDIDATES)} models that came back; no numbers",
        "no data",
        sum(map(_size, measured)),
        COORDINATOR,
        COORDINATOR,
    )
    shape = sums_shape(len(plan.model.labels))
    blocks = [Block(f"metrics of {name}", shape) for name in CANDIDATES]
    parts = tuple(Part(b.name, "uint64", b.shape, 8 * b.entries, _held_out(plan)) for b in blocks)
    yield from _masked_sum("metrics", "its held-out results", about, plan, sum(b.entries for b in blocks), parts, sums)


def _masked_sum(
    name: Sum, what: str, about: Mapping[str, Any], plan: Plan, words: int, parts: tuple[Part, ...], readers: str
) -> Iterator[Departure]:
    """Yield what leaves for one of the two sums: the vector, a signature, and what opens the sum."""
    pieces = [min(PIECE_BYTES // 8, words - start) for start in range(0, words, PIECE_BYTES // 8)]
    replies = [MaskedReply(**about, sum_of=name, piece=piece) for piece in range(len(pieces))]
    many = f", in {len(pieces)} pieces" if len(pieces) > 1 else ""
    yield Departure(
        "masked",
        f"{what}, as one vector of {words:,} words of 64 bits{many}, masks added to each",
        "masked",
        sum(_size(reply, [("masked", "uint64", (count,))]) for reply, count in zip(replies, pieces, strict=True)),
        COORDINATOR,
        readers,
        parts,
    )
    yield Departure(
        "survivors",
        "its signature over the list of silos that are in this sum",
        "signature",
        _size(SurvivorsReply(**about, sum_of=name, signature="00" * SIGNATURE_BYTES)),
        f"{COORDINATOR}, and through it all silos in the sum",
        "all of them; a signature is there to be read",
        (_value("signature", SIGNATURE_BYTES, "Ed25519, by this silo's identity"),),
    )
    yield Departure(
        "unmask",
        "one share for each silo: what takes the masks off the sum, and off nothing else",
        "shares",
        _size(UnmaskReply(**about, sum_of=name, shares=dict.fromkeys(plan.names, "00" * SHARE_BYTES))),
        COORDINATOR,
        f"{COORDINATOR}; {plan.threshold} of {len(plan.names)} shares open the sum",
        tuple(_value(f"share for {silo}", SHARE_BYTES, "Shamir") for silo in plan.names),
    )


def _open_run(about: Mapping[str, Any], plan: Plan, layout: Layout) -> Iterator[Departure]:
    tokens = {group.name: plan.merge.tokens for group in layout.groups}
    yield Departure(
        "train",
        "how many training examples it has, and how many tokens are behind each Gram matrix",
        "open",
        _size(TrainReply(**about, examples=MOST_EXAMPLES, tokens=tokens)),
        COORDINATOR,
        COORDINATOR,
        (
            Part("examples", "count", (), len(str(MOST_EXAMPLES)), "number of training examples"),
            *(
                Part(f"tokens of {name}", "count", (), len(str(most)), "number of tokens")
                for name, most in tokens.items()
            ),
        ),
    )
    size = 0
    for number, slices in enumerate(layout.pieces()):
        arrays = [(s.name, "float32", s.block.shape if s.name == s.block.name else (s.stop - s.start,)) for s in slices]
        size += _size(UploadReply(**about, piece=number), arrays)
    yield Departure(
        "upload",
        f"its contribution, as it is, in {len(layout.blocks)} arrays: its Gram matrices, and how its parameters "
        "differ from the base model's",
        "open",
        size,
        COORDINATOR,
        f"{COORDINATOR}: base model and differences are this silo's own model",
        tuple(Part(b.name, "float32", b.shape, ITEM_BYTES * b.entries, _says(b, layout)) for b in layout.blocks),
    )
    if plan.privacy.metrics != "none":
        yield _results(about, plan)


def _results(about: Mapping[str, Any], plan: Plan) -> Departure:
    """Return how held-out results leave in the clear."""
    shape = sums_shape(len(plan.model.labels))
    array = ("sums", "float64", shape)
    said = "shown as a sum, read one by one" if plan.privacy.metrics == "sum" else "shown silo by silo"
    return Departure(
        "evaluate",
        f"its held-out results, for each of the {len(CANDIDATES)} models that come back: {_held_out(plan)}; {said}",
        "open",
        sum(_size(EvaluateReply(**about, candidate=name), [array]) for name in CANDIDATES),
        COORDINATOR,
        COORDINATOR,
        tuple(
            Part(f"sums of {name}", "float64", shape, 8 * Block("", shape).entries, _held_out(plan))
            for name in CANDIDATES
        ),
    )


def _nothing(reply: Message, what: str) -> Departure:
    return Departure(reply.phase, what, "no data", _size(reply), COORDINATOR, COORDINATOR)


def _size(reply: Message, arrays: Iterable[tuple[str, str, tuple[int, ...]]] = ()) -> int:
    """Return the bytes of a message with such arrays: `gramfuse_protocol.wire`, without making them."""
    index = [[name, dtype, list(shape)] for name, dtype, shape in arrays]
    header = {"phase": reply.phase, "body": reply.model_dump(mode="json"), "arrays": index}
    data = sum(math.prod(shape) * DTYPES[dtype].itemsize for _, dtype, shape in arrays)
    return len(canonical_json(header)) + data


def _advert(silo: str) -> Advert:
    """Return keys of the size that a silo's have."""
    key = "00" * KEY_BYTES
    keys = dict.fromkeys(SUMS, key)
    return Advert(silo=silo, channel=key, masks=keys, commitments=keys, signature="00" * SIGNATURE_BYTES)


def _value(name: str, size: int, what: str) -> Part:
    return Part(name, "bytes", (size,), size, what)


def _says(block: Block, layout: Layout) -> str:
    """Say in words what a block of a contribution is."""
    kind, _, name = block.name.partition(":")
    if kind == "count":
        return "this silo's weight in the merge, its number of examples, and of tokens for each Gram matrix"
    if kind in ("m", "delta"):
        return "change of a parameter"
    group = next(group for group in layout.groups if group.name == name)
    if kind == "t":
        return "Gram matrix times change of the layer's weights"
    square = f"{group.d_in:,} × {group.d_in:,}"
    structure = parse_structure(group.structure)
    if structure is None:
        return f"Gram matrix, {square}, upper half"
    if structure == 1:
        return f"Gram matrix, diagonal of {square}"
    return f"Gram matrix, {square}, in blocks of {structure}, upper halves"


def _held_out(plan: Plan) -> str:
    """Say in words what held-out results are."""
    if plan.model.labels:
        return "how many held-out examples of each label got which label"
    return "eight sums over the held-out examples, of truth, prediction and error"


def _claims(plan: Plan) -> tuple[str, ...]:
    """Return who can learn what; docs/threat-model.md has the reasons."""
    after = (
        "The merged model goes to the coordinator and from there to others. What its weights say about the silos' data "
        "is not masked, and no noise is added to it (no differential privacy)."
    )
    if not plan.privacy.secure_aggregation:
        return (
            "Open: the coordinator can read this silo's own Gram matrices and weight changes, and so has this silo's "
            "own fine-tuned model. Both hold information about the silo's data.",
            "On the way, TLS is what keeps others from reading it. Other silos do not get it.",
            after,
        )
    silos, minimum = len(plan.names), plan.minimum_survivors
    most = tolerated(silos, plan.threshold, minimum)["colluding"]
    who = (
        "no other silo works"
        if most == 0
        else "at most 1 other silo works"
        if most == 1
        else f"at most {most} other silos work"
    )
    asked = f" The plan asks for {plan.privacy.colluding}." if most != plan.privacy.colluding else ""
    return (
        "Masked: the coordinator gets random words from each silo. All that it can read is their sum, over at least "
        f"{minimum} of the {silos} silos. Other silos cannot read even that, nor, because of TLS, can the network.",
        f"This holds as long as {who} together with the coordinator, even if it lies to the silos.{asked} Those who "
        "work together can take their own parts out of the sum; what is left is a sum over at least "
        f"{minimum - most} silos, this one among them.",
        f"If more than {most} work together with the coordinator, they may be able to read this silo's own part.",
        f"The sum is not anonymous: it says something about the data of the {minimum} or more silos together.",
        after,
    )


def _stays(plan: Plan, layout: Layout) -> tuple[str, ...]:
    """Return what does not leave."""
    stays = [
        "texts and labels, of training and held-out examples alike",
        "predictions, losses, or anything else of one example",
    ]
    if plan.privacy.secure_aggregation:
        stays.append("this silo's own fine-tuned model, Gram matrices and numbers of examples, other than masked")
    if plan.privacy.metrics == "none":
        stays.append("held-out results")
    if layout.frozen:
        stays.append(f"the {len(layout.frozen)} parameters that the plan freezes")
    return (*stays, "the silo file, private keys, the ledger, logs, and what error messages quote")

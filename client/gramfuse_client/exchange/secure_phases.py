"""The silo's part in the secure sum's phases: keys, shares, masked, survivors, unmask.

`gramfuse_protocol.secure_sum.member` has the cryptography; this module provides its inputs and stores its state on
disk. A message that violates the protocol raises SecurityError. `Participant` then ends the session: it wipes the
secrets, and nothing more leaves.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gramfuse_client.guard.policy import check_space
from gramfuse_client.guard.releases import Cohort, Release, Releases
from gramfuse_client.silo_file import Silo
from gramfuse_client.state.masked_vector import read_masked, write_masked, write_masked_words
from gramfuse_client.state.measurements import Measurement
from gramfuse_client.state.session import Answer, Record, answer_key, answered, with_answer
from gramfuse_client.state.state import Contributed, State
from gramfuse_protocol.contract.form import Form
from gramfuse_protocol.contract.head_layout import HeadLayout
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.roster import Roster
from gramfuse_protocol.contract.stages import subject
from gramfuse_protocol.errors import ContributionError, DataError, FederationError, RefusalError, SecurityError
from gramfuse_protocol.messages.phases import (
    KeysReply,
    KeysRequest,
    MaskedReply,
    MaskedRequest,
    Message,
    SecureRequest,
    SharesReply,
    SharesRequest,
    SurvivorsReply,
    SurvivorsRequest,
    UnmaskReply,
    UnmaskRequest,
)
from gramfuse_protocol.messages.wire import pack
from gramfuse_protocol.secure_sum import member as secure_sum
from gramfuse_protocol.secure_sum.fixed_point import encode
from gramfuse_protocol.secure_sum.member import Member
from gramfuse_protocol.secure_sum.scales import MOST_WEIGHED, Scale, scales
from gramfuse_protocol.secure_sum.statements import Sum, metrics_context, round_digest
from gramfuse_protocol.statistics.contribution import Contribution
from gramfuse_protocol.statistics.head_sums import HeadSums


class Membership:
    """One silo's part in one session."""

    def __init__(self, silo: Silo, plan: Plan, layout: Layout, state: State, releases: Releases, nonce: str) -> None:
        if not plan.privacy.secure_aggregation:
            raise FederationError("the plan has no secure sum", reason="the plan has no secure sum")
        self.silo = silo
        self.plan = plan
        self.stage = plan.stage(state.round)
        self.form = self.stage.form(layout)
        self.state = state
        self.releases = releases
        self.session = state.session(nonce)

    def answer(self, request: SecureRequest) -> Message:
        """Return the reply to a request of the secure phases.

        Raises:
            SecurityError: if it violates the protocol; the caller must end the session.
            GramfuseError: of another type, if it is not an attack; the session continues.
        """
        if isinstance(request, MaskedRequest):
            return self._masked(request)
        record = self._read(request)
        key = request.phase
        if isinstance(request, SurvivorsRequest | UnmaskRequest):
            key = answer_key(request.phase, request.sum_of)
        if reply := answered(record, key, request):
            return reply
        member: Member | None
        match request:
            case KeysRequest():
                reply, member = self._keys(record, request)
            case SharesRequest():
                reply, member = self._shares(record, request)
            case SurvivorsRequest():
                reply, member = self._survivors(record, request)
            case UnmaskRequest():
                reply, member = self._unmask(record, request)
            case _:
                raise FederationError(f"a silo does not answer phase {request.phase!r}")
        self.session.write(with_answer(record, key, request, reply, member=member))
        if isinstance(request, UnmaskRequest):
            self.session.masked(request.sum_of).unlink(missing_ok=True)
        return reply

    def _keys(self, record: Record, request: KeysRequest) -> tuple[Message, Member]:
        member = secure_sum.advertise(
            self._roster(record),
            request.session,
            self.silo.name,
            request.cohort,
            self.silo.identity(),
            secrets.token_bytes,
        )
        return KeysReply(**self._about(request), advert=member.advert), member

    def _shares(self, record: Record, request: SharesRequest) -> tuple[Message, Member]:
        member, sealed = secure_sum.share(
            self._roster(record), self._member(record), request.adverts, secrets.token_bytes
        )
        return SharesReply(**self._about(request), sealed={name: data.hex() for name, data in sealed.items()}), member

    def _masked(self, request: MaskedRequest) -> Message:
        record = self.session.read()
        name = request.sum_of
        whole = pack(request.model_copy(update={"piece": 0})).digest
        key = answer_key(request.phase, name)
        if key not in record.answers:
            self._write_vector(record, request, key, whole)
        elif record.answers[key].request != whole:
            raise SecurityError(f"the coordinator sent a second, different request for the sum of {name}")
        path, words = self.session.masked(name), request.piece_bytes // 8
        if not path.exists():
            raise RefusalError(
                f"{path}: the masked vector was removed, and cannot be made again",
                reason="the sum is over at this silo",
            )
        piece = read_masked(path, request.piece * words, words)
        if not piece.size:
            raise FederationError(
                f"the coordinator asked for piece {request.piece}, but there are fewer", reason="no such piece"
            )
        return MaskedReply(**self._about(request), sum_of=name, piece=request.piece, arrays={"masked": piece})

    def _write_vector(self, record: Record, request: MaskedRequest, key: str, whole: str) -> None:
        """Mask this silo's vector, once only, and write it to disk.

        Args:
            key: what the session keeps the answer under.
            whole: digest of the request without its piece.
        """
        member, name, roster = self._member(record), request.sum_of, self._roster(record)
        if name == "statistics":
            sealed = {peer: bytes.fromhex(data) for peer, data in request.sealed.items()}
            member = secure_sum.receive(roster, member, sealed)
            if self.state.origin().start != record.start:
                raise SecurityError("the statistics start from another model than the keys were made for")
        else:
            if self.plan.privacy.metrics != "sum":
                raise SecurityError("the coordinator asked for a sum of metrics, but the plan has none")
            if request.candidates != self.stage.results or set(self._measured()) != set(request.candidates):
                raise SecurityError("a sum of metrics was requested for other models than this silo measured")
        check_space(self.silo, 8 * self._entries(name))
        with self.state.attempts.attempt(request, key, whole, anew=True):
            member, masks = secure_sum.contribute(roster, member, name, whole, self._context(name))
            path = self.session.masked(name)
            if name == "statistics":
                origin = self.state.origin()
                record = record.model_copy(update={"data": origin.data, "rows": origin.rows})
                blocks = statistics_blocks(self.silo, self.plan, self.form, self.state.contribution())
                write_masked(path, blocks, len(roster.keys), masks)
            else:
                words = [word for candidate in request.candidates for word in self._measured()[candidate].words]
                write_masked_words(path, np.array(words, np.uint64), masks)
        answers = {**record.answers, key: Answer(request=whole)}
        self.session.write(record.model_copy(update={"member": member, "answers": answers}))

    def _measured(self) -> Mapping[str, Measurement]:
        return self.state.measurements.of(self.state.round)

    def _entries(self, name: Sum) -> int:
        """Return the number of words in a vector."""
        if name == "statistics":
            return self.form.sum_entries
        return sum(len(measurement.words) for measurement in self._measured().values())

    def _context(self, name: Sum) -> str:
        """Return the digest of what a sum is about, from this silo's own state."""
        if name == "statistics":
            return self.form.digest
        measured = self._measured()
        return metrics_context({candidate: measured[candidate].model for candidate in self.stage.results})

    def _survivors(self, record: Record, request: SurvivorsRequest) -> tuple[Message, Member]:
        name = request.sum_of
        member, signature = secure_sum.sign(
            self._roster(record), self._member(record), self.silo.identity(), name, request.survivors
        )
        contributed = self._contributed_with(record, request)
        content = pack(request).digest
        with self.state.attempts.attempt(request, answer_key("survivors", name), content, anew=True):
            if contributed.data != record.data:
                raise DataError(
                    "this silo signed a sum over other data under this plan before, and the difference of the two "
                    "would reveal what changed; restore the earlier data, or agree on a new plan"
                )
            self._release(record, request)
            self.state.contribute(contributed)
        return SurvivorsReply(**self._about(request), sum_of=name, signature=signature.hex()), member

    def _contributed_with(self, record: Record, request: SurvivorsRequest) -> Contributed:
        """Return the record of this silo's contributions under the plan, with this sum added.

        Raises:
            SecurityError: if this silo signed another set of survivors for a sum of the same subject under this plan:
                the difference of the two sums would be the input of a few silos.
        """
        name = subject(self.plan, self.stage, request.sum_of)
        contributed = self.state.contributed() or Contributed(data=record.data)
        if contributed.survivors.get(name, request.survivors) != request.survivors:
            raise SecurityError(
                f"this silo signed a sum of {name} over other silos under this plan before, and the difference of the "
                "two would reveal single silos' contributions"
            )
        survivors = {**contributed.survivors, name: request.survivors}
        contributed = contributed.including(self.state.round, self.session.directory.name, record.start)
        return contributed.model_copy(update={"survivors": survivors})

    def _release(self, record: Record, request: SurvivorsRequest) -> None:
        """Record, before signing, that a sum over these survivors may become known.

        Raises:
            RefusalError: if its difference from an earlier sum would be the contribution of a few silos.
        """
        rows = record.rows if request.sum_of == "statistics" else self.state.measurements.held_out().rows
        heads = self.stage.fits_head and request.sum_of == "statistics"
        least = self.silo.file.limits.minimum_label_examples if heads else 0
        release = Release(
            round=self.state.round,
            session=request.session,
            sum_of=subject(self.plan, self.stage, request.sum_of),
            cohort=Cohort.of(self.plan, self.silo.name, request.survivors, least=least),
            rows=rows,
        )
        if not self.silo.file.limits.differing_survivors:
            self.releases.check(release)
        self.releases.add(release)

    def _unmask(self, record: Record, request: UnmaskRequest) -> tuple[Message, Member | None]:
        member, name = self._member(record), request.sum_of
        signatures = {peer: bytes.fromhex(signature) for peer, signature in request.signatures.items()}
        shares = secure_sum.release(self._roster(record), member, name, signatures)
        reply = UnmaskReply(
            **self._about(request), sum_of=name, shares={peer: share.hex() for peer, share in shares.items()}
        )
        last = name == "metrics" or not (self.plan.summed and self.stage.measured)
        return reply, None if last else secure_sum.forget(member, name)

    def _read(self, request: SecureRequest) -> Record:
        """Return the session's record; in the keys phase, bind it to the model that the statistics start from."""
        record = self.session.read()
        if not isinstance(request, KeysRequest) or record.answers:
            return record
        if not self.state.trained:
            raise FederationError("the coordinator asked for keys before training", reason="not trained")
        return record.model_copy(update={"start": self.state.origin().start})

    def _roster(self, record: Record) -> Roster:
        return replace(self.plan.roster, plan=round_digest(self.plan.digest, record.round, record.start))

    def _member(self, record: Record) -> Member:
        if record.member is None:
            raise SecurityError("a message of a secure phase came before the keys, or after the last sum was unmasked")
        return record.member

    def _about(self, request: Message) -> dict[str, Any]:
        return {**request.about, "silo": self.silo.name}


def statistics_blocks(
    silo: Silo, plan: Plan, form: Form, contribution: Contribution
) -> Iterator[tuple[str, NDArray[np.float64], Scale]]:
    """Yield (name, values, scale) of each block that a silo adds to the sum of statistics, or to that of a head."""
    merge, scaled = plan.merge, scales(form, len(plan.silo), plan.merge.weighting)
    rows = contribution.examples if merge.weighting == "examples" else 0.0
    if isinstance(form, HeadLayout):
        rows = HeadSums.read(form, contribution.block).examples
    if rows > MOST_WEIGHED:
        raise ContributionError(
            f"{rows:.0f} examples are more than the {MOST_WEIGHED} that a secure sum can weigh; agree on "
            "merge.weighting = 'uniform' and model.head = 'same'"
        )
    if not isinstance(form, Layout):
        for block, scale in scaled:
            yield block.name, np.asarray(contribution.block(block.name), np.float64), scale
        return
    import torch  # takes seconds to import, and nothing else in the secure phases needs it

    from gramfuse_model.normal_equations import summands

    if silo.file.threads:
        torch.set_num_threads(silo.file.threads)
    values = summands(
        form, contribution, alpha=merge.alpha, weighting=merge.weighting, silo=silo.name, counted=plan.counted
    )
    for (block, array), (_, scale) in zip(values, scaled, strict=True):
        yield block.name, array, scale


def check_range(silo: Silo, plan: Plan, form: Form, contribution: Contribution) -> None:
    """Raise ContributionError if statistics do not fit the range of a secure sum. Called before they are stored.

    If a silo failed only later, while masking, it would drop out, and the others would have to reveal its mask key.
    """
    for name, values, scale in statistics_blocks(silo, plan, form, contribution):
        encode(values, scale, len(plan.silo), name, lambda count: np.empty(count, np.uint64))

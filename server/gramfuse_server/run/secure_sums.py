"""The coordinator's part in a secure sum: forwards keys and shares, adds masked vectors, removes the masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from gramfuse_protocol.errors import ContributionError, FederationError, GramfuseError, RefusalError, SecurityError
from gramfuse_protocol.messages.phases import (
    KeysReply,
    KeysRequest,
    MaskedReply,
    MaskedRequest,
    SharesReply,
    SharesRequest,
    SurvivorsReply,
    SurvivorsRequest,
    UnmaskReply,
    UnmaskRequest,
)
from gramfuse_protocol.secure_sum import masks
from gramfuse_protocol.secure_sum import member as secure_sum
from gramfuse_protocol.secure_sum import unmasking as unmask
from gramfuse_protocol.secure_sum.masks import Mask, Words
from gramfuse_protocol.secure_sum.member import Signed
from gramfuse_protocol.secure_sum.statements import Advert, Sum, round_digest, session_id
from gramfuse_server.run.conductor import Conductor, Q, R
from gramfuse_server.run.spool import Spool

UPLOADS = 2
"""Silos that upload at the same time."""


def add_up(spool: Spool, survivors: Sequence[str], pieces: Sequence[tuple[int, int]]) -> Words:
    """Return the sum of the survivors' spooled vectors modulo 2^64, still masked; allocates only the result.

    Args:
        pieces: (start, stop) of each piece of a vector.
    """
    words = np.zeros(pieces[-1][1], "<u8")
    for piece, (start, stop) in enumerate(pieces):
        for silo in survivors:
            spool.add_to(words[start:stop], silo, piece, "masked")
    return words


class SecureSums:
    """The secure sums of one session. Every phase is checkpointed, so that a run can resume where it stopped.

    Args:
        conductor: leads the silos.
        piece_bytes: most bytes of a vector in one message.
        start: `gramfuse_protocol.secure_sum.statements.model_digest` of the model that silos started from; empty in the
            first session.
    """

    def __init__(self, conductor: Conductor, piece_bytes: int, start: str) -> None:
        self.conductor = conductor
        roster = conductor.plan.roster
        self.roster = replace(roster, plan=round_digest(roster.plan, conductor.round, start))
        self.piece_bytes = piece_bytes
        self.floor = max(self.roster.floor, conductor.needed)
        self.adverts: tuple[Advert, ...] = ()
        self.sealed: Mapping[str, Mapping[str, str]] = {}

    def prepare(self) -> None:
        """Exchange keys and shares among the remaining silos.

        Raises:
            GramfuseError: if fewer are left than the plan requires.
        """
        kept = self.conductor.step("keys", self._keys)
        self.adverts = tuple(Advert.model_validate_json(text) for text in kept)
        self.sealed = self.conductor.step("shares", self._shares)

    def statistics(self, entries: int, context: str) -> tuple[Words, tuple[str, ...]]:
        """Return the unmasked sum of the silos' vectors, and the silos in it.

        Args:
            entries: length of a vector, in 64-bit words.
            context: digest of the form of the vectors.
        """
        members = [advert.silo for advert in self.adverts if advert.silo in self.sealed]
        about = {
            silo: {"sealed": {peer: self.sealed[peer][silo] for peer in members if peer != silo}} for silo in members
        }
        return self._sum("statistics", members, about, entries, context)

    def release_late(self, survivors: Sequence[str]) -> None:
        """Have survivors that missed the unmask phase, and are back in a resumed run, sign and release their shares.

        A silo measures nothing before it released its shares. Silos that do not answer are lost.
        """
        done = self.conductor.done("unmask")
        late = [silo for silo in survivors if silo in self.conductor.nodes and silo not in done]
        if not late:
            return
        members = [advert.silo for advert in self.adverts if advert.silo in self.sealed]
        signed = SurvivorsRequest(**self.conductor.about, sum_of="statistics", survivors=tuple(survivors))
        released = UnmaskRequest(
            **self.conductor.about, sum_of="statistics", signatures=self.conductor.done("survivors")
        )

        with self.conductor.phase("unmask"):
            self._gather(SurvivorsReply, signed, late, 0, lambda silo, request, reply: None)
            self._gather(UnmaskReply, released, late, 0, _one_share_each(members))

    def metrics(
        self, members: Sequence[str], candidates: Sequence[str], entries: int, context: str
    ) -> tuple[Words, tuple[str, ...]]:
        """Return the unmasked sum of the candidates' metrics, concatenated, and the silos in it.

        Args:
            members: survivors of the statistics.
            context: `gramfuse_protocol.secure_sum.statements.metrics_context`.
        """
        about = {silo: {"candidates": tuple(candidates)} for silo in members}
        return self._sum("metrics", members, about, entries, context)

    def _keys(self) -> list[str]:
        conductor = self.conductor
        cohort = tuple(conductor.decide("cohort", list(conductor.nodes)))
        request = KeysRequest(**conductor.about, cohort=cohort)
        keys: set[str] = set()

        def check(silo: str, _: KeysRequest, reply: KeysReply) -> None:
            advert = reply.advert
            if advert.silo != silo:
                raise SecurityError(f"silo {silo!r} sent the keys of {advert.silo!r}")
            secure_sum.check_advert(self.roster, conductor.nonce, advert)
            public = {advert.channel, *advert.masks.values()}
            if public & keys:
                raise SecurityError(f"silo {silo!r} sent a key that another silo already sent")
            keys.update(public)

        replies = self._gather(KeysReply, request, cohort, self.floor, check)
        present = [replies[name].advert for name in cohort if name in replies]
        secure_sum.check_adverts(self.roster, conductor.nonce, cohort, present)
        return [advert.model_dump_json() for advert in present]

    def _shares(self) -> dict[str, dict[str, str]]:
        names = [advert.silo for advert in self.adverts]
        request = SharesRequest(**self.conductor.about, adverts=self.adverts)

        def check(silo: str, _: SharesRequest, reply: SharesReply) -> None:
            if set(reply.sealed) != set(names) - {silo}:
                raise SecurityError(f"silo {silo!r} did not seal exactly one share for each peer")

        replies = self._gather(SharesReply, request, names, self.floor, check)
        return {silo: dict(reply.sealed) for silo, reply in replies.items()}

    def _sum(
        self, name: Sum, members: Sequence[str], about: Mapping[str, Mapping[str, Any]], entries: int, context: str
    ) -> tuple[Words, tuple[str, ...]]:
        suffix = "" if name == "statistics" else "-metrics"
        step = self.conductor.step
        spool = Spool(self.conductor.place(f"spool{suffix}"))
        # Silos sign one list of survivors for the sums of one subject.
        only = self.conductor.earlier("masked-metrics") if suffix else self.conductor.only
        fields = {silo: about[silo] for silo in only if silo in about} if only else about
        needed = len(only) if only else self.floor
        survivors = tuple(step(f"masked{suffix}", lambda: self._masked(name, spool, fields, entries, needed)))
        self._restore(name, spool, {silo: about[silo] for silo in survivors}, entries)
        signed = Signed(survivors=survivors, context=context)
        signatures = step(f"survivors{suffix}", lambda: self._survivors(name, members, signed))
        shares = step(f"unmask{suffix}", lambda: self._unmask(name, members, signatures))
        words = add_up(spool, survivors, self._pieces(entries))
        released = {
            silo: {owner: bytes.fromhex(share) for owner, share in theirs.items()} for silo, theirs in shares.items()
        }
        masks.apply(words, self._unmasking(name, members, signed, released))
        return words, survivors

    def _unmasking(
        self, name: Sum, members: Sequence[str], signed: Signed, released: Mapping[str, Mapping[str, bytes]]
    ) -> list[Mask]:
        """Return the masks to subtract; a single silo with wrong shares is dropped if the others' shares suffice.

        Raises:
            SecurityError: if several silos released wrong shares, or the rest are below the threshold.
        """

        def unmasking(shares: Mapping[str, Mapping[str, bytes]]) -> list[Mask]:
            return unmask.unmasking(self.roster, self.conductor.nonce, self.adverts, name, members, signed, shares)

        try:
            return unmasking(released)
        except SecurityError as error:
            for silo in released if len(released) > self.roster.threshold else ():
                with suppress(SecurityError):
                    removal = unmasking({other: shares for other, shares in released.items() if other != silo})
                    self.conductor.lose("unmask", silo, SecurityError(f"silo {silo!r} released a wrong share"))
                    self.conductor.keep_only([other for other in self.conductor.nodes if other != silo])
                    return removal
            raise error from None

    def _pieces(self, entries: int) -> list[tuple[int, int]]:
        size = self.piece_bytes // 8
        return [(start, min(entries, start + size)) for start in range(0, entries, size)]

    def _masked(
        self, name: Sum, spool: Spool, about: Mapping[str, Mapping[str, Any]], entries: int, needed: int
    ) -> list[str]:
        conductor, pieces = self.conductor, self._pieces(entries)
        requests = {
            silo: [
                MaskedRequest(**conductor.about, sum_of=name, **about[silo], piece=piece, piece_bytes=self.piece_bytes)
                for piece in range(len(pieces))
                if not spool.has(silo, piece)
            ]
            for silo in about
            if silo in conductor.nodes
        }

        def check(silo: str, request: MaskedRequest, reply: MaskedReply) -> None:
            start, stop = pieces[request.piece]
            masked = reply.arrays.get("masked")
            if (reply.sum_of, reply.piece) != (name, request.piece):
                raise FederationError(f"silo {silo!r} sent piece {reply.piece}; expected piece {request.piece}")
            if len(reply.arrays) != 1 or masked is None or masked.dtype != np.uint64 or masked.shape != (stop - start,):
                raise FederationError(
                    f"silo {silo!r} sent a malformed piece; expected one array 'masked', uint64 {(stop - start,)}"
                )

        complete = [silo for silo in about if silo not in requests and spool.has(silo, len(pieces) - 1)]
        for silo, request, reply in conductor.ask(
            MaskedReply,
            requests,
            in_flight=UPLOADS if len(pieces) > 1 else None,
            needed=needed - len(complete),
            check=check,
        ):
            with conductor.run.writing():
                spool.save(silo, request.piece, {"masked": reply.arrays["masked"]})
            conductor.tell("masked", "silo", silo=silo, piece=request.piece + 1, pieces=len(pieces))
        return [silo for silo in about if all(spool.has(silo, piece) for piece in range(len(pieces)))]

    def _restore(self, name: Sum, spool: Spool, about: Mapping[str, Mapping[str, Any]], entries: int) -> None:
        """Request again the pieces of survivors' vectors that an interrupted run's disk lost.

        Raises:
            ContributionError: if a silo no longer has its vector.
        """
        pieces = range(len(self._pieces(entries)))
        if all(spool.has(silo, piece) for silo in about for piece in pieces):
            return
        try:
            self._masked(name, spool, about, entries, len(about))
        except GramfuseError as error:
            if not any(isinstance(self.conductor.lost.get(silo), RefusalError) for silo in about):
                raise
            raise ContributionError(
                f"a masked vector is damaged on this disk, and its silo refuses to send it again: {error}\n"
                "This run cannot be resumed; start a new one"
            ) from None

    def _survivors(self, name: Sum, members: Sequence[str], signed: Signed) -> dict[str, str]:
        request = SurvivorsRequest(**self.conductor.about, sum_of=name, survivors=signed.survivors)
        session = session_id(self.roster.plan, self.conductor.nonce, self.adverts)

        def check(silo: str, _: SurvivorsRequest, reply: SurvivorsReply) -> None:
            secure_sum.check_signature(
                self.roster, session, name, members, signed, silo, bytes.fromhex(reply.signature)
            )

        replies = self._gather(SurvivorsReply, request, signed.survivors, self.roster.threshold, check)
        return {silo: replies[silo].signature for silo in signed.survivors if silo in replies}

    def _unmask(self, name: Sum, members: Sequence[str], signatures: Mapping[str, str]) -> dict[str, dict[str, str]]:
        request = UnmaskRequest(**self.conductor.about, sum_of=name, signatures=signatures)
        replies = self._gather(UnmaskReply, request, tuple(signatures), self.roster.threshold, _one_share_each(members))
        return {silo: dict(reply.shares) for silo, reply in replies.items()}

    def _gather(
        self, kind: type[R], request: Q, silos: Sequence[str], needed: int, check: Callable[[str, Q, R], None]
    ) -> dict[str, R]:
        """Send one request to those silos that remain, and return their checked replies by silo."""
        conductor, replies = self.conductor, {}
        requests = {silo: [request] for silo in silos if silo in conductor.nodes}
        for silo, _, reply in conductor.ask(kind, requests, needed=needed, check=check):
            replies[silo] = reply
            conductor.tell(request.phase, "silo", silo=silo)
        return replies


def _one_share_each(members: Sequence[str]) -> Callable[[str, UnmaskRequest, UnmaskReply], None]:
    def check(silo: str, _: UnmaskRequest, reply: UnmaskReply) -> None:
        if set(reply.shares) != set(members):
            raise SecurityError(f"silo {silo!r} did not release exactly one share for each member of the sum")

    return check

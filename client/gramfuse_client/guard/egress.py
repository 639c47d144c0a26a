"""The way out of a silo: a Flower mod around the whole app. What leaves is in the ledger before it leaves.

Only two things pass: a message of the protocol, and an error with a fixed reason. Whatever else the app returns or
raises becomes such an error. If the ledger cannot be written, that is what leaves, and nothing more.
"""

from __future__ import annotations

import hashlib
import logging

from flwr.app import Context, Error, Message
from flwr.clientapp.typing import ClientAppCallable

from gramfuse_client.guard.disclosure import form_of
from gramfuse_client.guard.ledger import Ledger
from gramfuse_client.guard.ledger_lines import Entry, Item
from gramfuse_client.silo_file import Silo
from gramfuse_protocol.errors import FederationError, GramfuseError, LedgerError
from gramfuse_protocol.messages import phases
from gramfuse_protocol.messages.flower_records import from_record, request_of, to_record
from gramfuse_protocol.messages.phases import PHASES, REPLIES, Refusal
from gramfuse_protocol.messages.wire import pack, unpack
from gramfuse_protocol.text import one_line

REFUSED = 6
"""Flower's code for what a mod stopped."""

UNEXPECTED = "an unexpected error at the silo"

log = logging.getLogger(__name__)


class Egress:
    """A Flower mod.

    Args:
        silo: whose ledger is written.
    """

    def __init__(self, silo: Silo) -> None:
        self.silo = silo
        self.ledger = Ledger(silo.ledger, silo.name)

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Have the app answer, write the answer into the ledger, and return it."""
        try:
            reply = call_next(message, context)
            entry = self._entry(message, reply)
        except GramfuseError as error:
            log.error("silo %s: %s: %s", self.silo.name, type(error).__name__, error)
            reply, entry = self._declined(message, error)
        except Exception:
            # Flower would send the exception's text to the coordinator; it may quote data.
            log.exception("silo %s: unexpected error", self.silo.name)
            reply, entry = self._declined(message, GramfuseError("", reason=UNEXPECTED))
        try:
            self.ledger.append(entry)
        except LedgerError as error:
            log.error("silo %s: %s", self.silo.name, error)
            return failed(message, error)
        return reply

    def _declined(self, message: Message, error: GramfuseError) -> tuple[Message, Entry]:
        """Return a refusal if the request can be read, else one of Flower's errors."""
        try:
            refusal = phases.refusal(request_of(message), self.silo.name, error)
            reply = Message(to_record(pack(refusal)), reply_to=message)
            return reply, self._entry(message, reply)
        except FederationError:
            reply = failed(message, error)
            return reply, Entry(
                run=message.metadata.run_id, phase=_phase(message), kind="error", form="reason", note=reply.error.reason
            )

    def _entry(self, message: Message, reply: Message) -> Entry:
        frame = from_record(reply.content)
        said = unpack(frame, REPLIES)
        header = frame.header.encode("utf-8")
        items = [Item(name="header", dtype="json", shape=(), bytes=len(header), sha256=_sha256(header))]
        for name, array in said.arrays.items():
            items.append(
                Item(
                    name=name,
                    dtype=str(array.dtype),
                    shape=array.shape,
                    bytes=array.nbytes,
                    sha256=_sha256(array.reshape(-1).view("uint8").data),
                )
            )
        refused = isinstance(said, Refusal)
        return Entry(
            plan=said.plan,
            session=said.session,
            round=said.round,
            run=message.metadata.run_id,
            phase=_phase(message),
            kind="refusal" if refused else "reply",
            form=form_of(said),
            note=f"{said.error}: {said.reason}"[:2000] if isinstance(said, Refusal) else "",
            items=tuple(items),
        )


def failed(message: Message, error: GramfuseError) -> Message:
    """Return one of Flower's errors, with nothing in it but an error's type and its reason for the other side."""
    return Message(Error(REFUSED, one_line(f"{type(error).__name__}: {error.reason}", 2000)), reply_to=message)


def _phase(message: Message) -> str:
    kind = message.metadata.message_type
    return PHASES.get(kind, one_line(kind, 100))


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()

"""The only way out of a silo: a Flower mod around the whole app, which writes each message to the ledger first.

It lets only two things pass: a message of the protocol, and an error with a fixed reason. Anything else that the app
returns or raises becomes such an error. If the ledger cannot be written, only an error that says so leaves.
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
from gramfuse_protocol.messages.phases import PHASE_OF_TYPE, REPLIES, Refusal
from gramfuse_protocol.messages.wire import pack, unpack
from gramfuse_protocol.text import one_line

REFUSED = 6
"""Flower's error code for a message stopped by a mod."""

UNEXPECTED = "an unexpected error at the silo"

log = logging.getLogger(__name__)


class Egress:
    """A Flower mod that records and filters everything that leaves.

    Args:
        silo: the silo whose ledger to write.
    """

    def __init__(self, silo: Silo) -> None:
        self.silo = silo
        self.ledger = Ledger(silo.ledger, silo.name)

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Call the app, write its reply into the ledger, and return the reply."""
        try:
            reply = call_next(message, context)
            entry = self._entry(message, reply)
        except GramfuseError as error:
            log.error("silo %s: %s: %s", self.silo.name, type(error).__name__, error)
            reply, entry = self._declined(message, error)
        except Exception:
            # Flower would send the exception's text to the coordinator, and it may quote data.
            log.exception("silo %s: unexpected error", self.silo.name)
            reply, entry = self._declined(message, GramfuseError("", reason=UNEXPECTED))
        try:
            self.ledger.append(entry)
        except LedgerError as error:
            log.error("silo %s: %s", self.silo.name, error)
            return failed(message, error)
        return reply

    def _declined(self, message: Message, error: GramfuseError) -> tuple[Message, Entry]:
        """Return a refusal if the request can be read, otherwise a Flower error."""
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
        body = unpack(frame, REPLIES)
        header = frame.header.encode("utf-8")
        items = [Item(name="header", dtype="json", shape=(), bytes=len(header), sha256=_sha256(header))]
        for name, array in body.arrays.items():
            items.append(
                Item(
                    name=name,
                    dtype=str(array.dtype),
                    shape=array.shape,
                    bytes=array.nbytes,
                    sha256=_sha256(array.reshape(-1).view("uint8").data),
                )
            )
        return Entry(
            plan=body.plan,
            session=body.session,
            round=body.round,
            run=message.metadata.run_id,
            phase=_phase(message),
            kind="refusal" if isinstance(body, Refusal) else "reply",
            form=form_of(body),
            note=f"{body.error}: {body.reason}"[:2000] if isinstance(body, Refusal) else "",
            items=tuple(items),
        )


def failed(message: Message, error: GramfuseError) -> Message:
    """Return a Flower error that contains only an error's type and its reason."""
    return Message(Error(REFUSED, one_line(f"{type(error).__name__}: {error.reason}", 2000)), reply_to=message)


def _phase(message: Message) -> str:
    kind = message.metadata.message_type
    return PHASE_OF_TYPE.get(kind, one_line(kind, 100))


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()

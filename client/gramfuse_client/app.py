"""The Flower ClientApp: turns records into messages and back, nothing else.

A silo's operator starts Flower's SuperNode with `--node-config 'silo="/path/to/silo.toml"'`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from gramfuse_client.participant import Participant
from gramfuse_client.records import from_record, to_record
from gramfuse_client.silo import Silo
from gramfuse_protocol.errors import GramfuseError, PlanError
from gramfuse_protocol.messages import REQUESTS, refusal
from gramfuse_protocol.wire import pack, unpack


def client_app(silo_of: Callable[[Context], Silo]) -> ClientApp:
    """Return a ClientApp that answers for the silo which `silo_of` finds in the node's own context."""
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        _show_log()
        request = unpack(from_record(message.content), REQUESTS)
        try:
            reply = Participant(silo_of(context)).answer(request)
        except GramfuseError as error:
            logging.getLogger(__name__).error("%s", error)
            reply = refusal(request, "unknown", error)
        return Message(to_record(pack(reply)), reply_to=message)

    app.train()(answer)
    app.evaluate()(answer)
    for phase in ("join", "keys", "shares", "masked", "survivors", "unmask", "upload"):
        app.query(phase)(answer)
    return app


def _show_log() -> None:
    """Let the silo's operator see what this silo does; Flower shows only its own log."""
    logger = logging.getLogger("gramfuse_client")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


def _silo_of_node(context: Context) -> Silo:
    path = context.node_config.get("silo")
    if not isinstance(path, str):
        raise PlanError("start the SuperNode with --node-config 'silo=\"/path/to/silo.toml\"'")
    return Silo.read(Path(path))


app = client_app(_silo_of_node)

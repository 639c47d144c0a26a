"""The Flower ClientApp: takes requests, and sends replies only through `Egress`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from gramfuse_client.exchange.participant import Participant
from gramfuse_client.guard.bundle import check_bundle
from gramfuse_client.guard.egress import Egress, failed
from gramfuse_client.silo_file import Silo
from gramfuse_protocol.errors import GramfuseError, PlanError
from gramfuse_protocol.messages.flower_records import request_of, to_record
from gramfuse_protocol.messages.wire import pack
from gramfuse_protocol.text import lines_of, one_line

SiloOf = Callable[[Context], Silo]
"""Finds a node's silo from the node's own context, never from a run's configuration."""

log = logging.getLogger(__name__)


def silo_of_node(context: Context) -> Silo:
    """Read the silo file that the SuperNode was started with: `--node-config 'silo="/path/to/silo.toml"'`."""
    path = context.node_config.get("silo")
    if not isinstance(path, str):
        raise PlanError("start the silo with: gramfuse silo start SILO_TOML")
    return Silo.read(Path(path))


class SiloApp(ClientApp):
    """Answers for a silo. Overrides how Flower calls an app, so that the mod also sees unknown message types.

    Args:
        silo_of: finds the silo.
        bundle: the run's app bundle, to check; None in a simulation, which has no foreign bundles, and under the stock
            SuperNode, where Flower itself runs bundles.
    """

    def __init__(self, silo_of: SiloOf = silo_of_node, bundle: bytes | None = None) -> None:
        super().__init__()
        self._silo_of = silo_of
        self._bundle = bundle

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer one message."""
        _show_log()
        try:
            silo = self._silo_of(context)
        except GramfuseError as error:
            log.error("%s", error)
            return failed(message, PlanError("", reason="this silo cannot use its own silo file"))

        def answer(message: Message, context: Context) -> Message:
            if self._bundle is not None:
                check_bundle(silo, self._bundle)
            reply = Participant(silo).answer(request_of(message))
            return Message(to_record(pack(reply)), reply_to=message)

        return Egress(silo)(message, context, answer)


class _Formatter(logging.Formatter):
    """Formats log records so that text quoted from others cannot start a new line of the log."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's own name
        record.message = one_line(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802
        first, *others = lines_of(super().formatException(ei)).split("\n")
        last = one_line(f"{type(ei[1]).__name__}: {ei[1]}")
        return "\n".join([first, *(f"  {line}" for line in others), last])


def _show_log() -> None:
    """Show this silo's log to its operator; Flower shows only its own."""
    logger = logging.getLogger("gramfuse_client")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


def write_log(path: Path) -> None:
    """Also write the log of the silo that answers now to its own file; one process can answer for several silos."""
    logger = logging.getLogger("gramfuse_client")
    for handler in logger.handlers[:]:
        if isinstance(handler, logging.FileHandler):
            logger.removeHandler(handler)
            handler.close()
    path.touch(mode=0o600)
    to_file = logging.FileHandler(path, encoding="utf-8")
    to_file.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(to_file)


app = SiloApp()

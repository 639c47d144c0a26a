"""The terms of `gramfuse simulate --compare`: parsing, help, and the check against a plan.

The methods are in `gramfuse_server.merging.methods`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import PlanError
from gramfuse_server.merging.methods.registry import METHODS, Method, refused


@dataclass(frozen=True)
class Term:
    """One model to compare with.

    Args:
        text: as written by the user.
        kind: name of the method, before the first colon.
        options: all options of the method by name, with defaults filled in.
    """

    text: str
    kind: str
    options: Mapping[str, Any]

    @property
    def method(self) -> Method:
        """The method."""
        return METHODS[self.kind]


def parse_terms(text: str) -> tuple[Term, ...]:
    """Parse comma-separated terms; duplicates are dropped.

    Raises:
        ValueError: naming the wrong term and the choices.
    """
    return tuple({term.text: term for term in (_parse(part.strip()) for part in text.split(","))}.values())


def _parse(text: str) -> Term:
    name, *values = text.split(":")
    method = METHODS.get(name)
    if method is None:
        raise ValueError(f"unknown comparison {text!r}; choose from {', '.join(METHODS)}")
    try:
        return Term(text, name, method.options.parse(values))
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}; expected {name}{method.options.written}") from None


def explained(method: Method) -> str:
    """Return the help text of a method."""
    words = "; ".join(filter(None, [method.words, method.options.words, "always measured" if method.always else ""]))
    return f"{method.name}{method.options.written}: {words}{f' ({method.paper})' if method.paper else ''}."


def check_terms(terms: tuple[Term, ...], plan: Plan) -> None:
    """Raise PlanError, naming the terms and the remedy, if a plan does not allow a term."""
    conditions = {term.kind: refused(term.method) for term in terms}
    for refusal in dict.fromkeys(refusal for name in METHODS for refusal in conditions.get(name, ())):
        if refusal.applies(plan):
            texts = ",".join(term.text for term in terms if refusal in conditions[term.kind])
            raise PlanError(f"--compare {texts}: {refusal.why}")
    for term in terms:
        if "fisher" in term.method.needs:
            from gramfuse_client.training.fisher import choose_variant

            for task in plan.tasks.values():
                choose_variant(task, term.options.get("variant"))
        term.method.ready()

"""What `gramfuse simulate --compare` can be asked for, and which of it a plan allows.

What there is, `gramfuse_server.merging.methods` has.
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
        text: as it was written.
        kind: name of the method: what stands before the first colon.
        options: what stands behind it, by name, with the method's defaults for what was left out.
    """

    text: str
    kind: str
    options: Mapping[str, Any]

    @property
    def method(self) -> Method:
        """The method."""
        return METHODS[self.kind]


def parse_terms(text: str) -> tuple[Term, ...]:
    """Parse terms between commas; one that comes twice counts once.

    Raises:
        ValueError: saying which term is wrong, and what there is.
    """
    return tuple({term.text: term for term in (_parse(part.strip()) for part in text.split(","))}.values())


def _parse(text: str) -> Term:
    name, *values = text.split(":")
    method = METHODS.get(name)
    if method is None:
        raise ValueError(f"{text!r} is nothing to compare with; there are {', '.join(METHODS)}")
    try:
        return Term(text, name, method.options.parse(values))
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}; expected {name}{method.options.written}") from None


def explained(method: Method) -> str:
    """Return what --help says of a method."""
    words = "; ".join(filter(None, [method.words, method.options.words, "always measured" if method.always else ""]))
    return f"{method.name}{method.options.written}: {words}{f' ({method.paper})' if method.paper else ''}."


def check_terms(terms: tuple[Term, ...], plan: Plan) -> None:
    """Raise PlanError, naming the terms and saying what to do, if a plan does not allow all that is asked for."""
    named = {term.kind: refused(term.method) for term in terms}
    for refusal in dict.fromkeys(refusal for name in METHODS for refusal in named.get(name, ())):
        if refusal.applies(plan):
            together = ",".join(term.text for term in terms if refusal in named[term.kind])
            raise PlanError(f"--compare {together}: {refusal.why}")
    for term in terms:
        if "fisher" in term.method.needs:
            from gramfuse_client.training.fisher import choose_variant

            for task in plan.tasks.values():
                choose_variant(task, term.options.get("variant"))
        term.method.ready()

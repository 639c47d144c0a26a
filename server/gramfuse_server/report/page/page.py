"""The HTML page of a report: one static file without scripts or external resources."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.text import lines_of
from gramfuse_server.report.page.sections import heading, sections
from gramfuse_server.report.schema import Report


def page(report: Report, plan: Plan | None) -> str:
    """Return the page of a report, as HTML; deterministic.

    Args:
        report: of a complete run, a failed run, or a merge of files.
        plan: of the run, or None for files.

    Raises:
        KeyError, ValueError, ArithmeticError: if its parts contradict each other or the plan.
    """
    title, subtitle = heading(report, plan)
    return _template().render(
        title=title,
        subtitle=subtitle,
        failed=report.failure is not None,
        sections=sections(report, plan),
        version=report.versions["gramfuse"],
    )


def _shown(value: Any) -> Any:
    """Escape unprintable characters: a value can come from silos or from an untrusted report."""
    return lines_of(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("gramfuse_server.report.page"),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html")

"""Project directories: `plan.toml` and `silos/<name>.toml`, the argument of most commands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import tomlkit

from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.documents import read_text
from gramfuse_protocol.errors import PlanError
from gramfuse_protocol.files import replacing


@dataclass(frozen=True)
class Project:
    """A project directory and its plan, with any `--set` settings applied."""

    directory: Path
    plan: Plan

    @staticmethod
    def read(directory: Path, settings: Iterable[str] = ()) -> Project:
        """Read a project.

        Args:
            directory: the project directory, or the plan file in it.
            settings: `section.key=value` overrides.

        Raises:
            PlanError: if the plan is missing or invalid.
        """
        path = directory / "plan.toml" if directory.is_dir() else directory
        if path.name != "plan.toml":
            raise PlanError(f"{path}: expected a project directory or its plan.toml")
        return Project(path.parent.resolve(), Plan.read(path).override(settings))

    @property
    def plan_path(self) -> Path:
        """Path of the plan."""
        return self.directory / "plan.toml"

    @property
    def layout_path(self) -> Path:
        """Path of a locked plan's layout."""
        return self.directory / "layout.json"

    def locked(self) -> tuple[Plan, Layout]:
        """Return the locked plan and its layout, derived from the local base model.

        A locked plan is checked against the base model. Any other plan is locked in memory, with the newest commit of a
        hub model unless it names one, and with a fitted head where that is possible unless it says otherwise.
        """
        from gramfuse_model.derive_head import suits_fit
        from gramfuse_model.derive_layout import plan_layout
        from gramfuse_model.loading.base_model import load_base
        from gramfuse_model.probing.lengths import check_lengths
        from gramfuse_model.probing.suitable import check_answers, check_suitable

        base = load_base(self.plan, self.directory)
        check_lengths(base, self.plan.tasks.values(), trains=True)
        for silo in {entry.task: entry.name for entry in self.plan.silo}.values():
            silo_base = load_base(self.plan, self.directory, silo=silo) if self.plan.task else base
            check_suitable(silo_base, self.plan.task_of(silo))
            check_answers(silo_base)
        given = Layout.read(self.layout_path) if self.plan.locked and self.layout_path.exists() else None
        plan = self.plan.with_head("fitted" if suits_fit(self.plan, base) else "same")
        layout = plan_layout(plan, base, given)
        return plan if plan.locked else plan.pinned(base.pins, layout.digest), layout

    def write_lock(self, plan: Plan, layout: Layout) -> None:
        """Write digests and head into plan.toml, keeping its comments, and the layout next to it."""
        document = tomlkit.parse(read_text(self.plan_path))
        document["model"] |= {"head": plan.model.head}
        document["model"] |= {key: value for key, value in plan.pins._asdict().items() if value is not None}
        document.setdefault("merge", tomlkit.table())["layout"] = plan.merge.layout
        for path, text in ((self.layout_path, layout.to_json() + "\n"), (self.plan_path, tomlkit.dumps(document))):
            with replacing(path, private=False) as temporary:
                temporary.write_text(text, encoding="utf-8")

    def locked_layout(self) -> Layout:
        """Read the layout of a locked plan from its file.

        Raises:
            PlanError: if the plan is not locked, or the file is not the plan's layout.
        """
        if not self.plan.locked:
            raise PlanError(f"{self.plan_path}: the plan is not locked; run: gramfuse plan lock {self.directory}")
        try:
            layout = Layout.read(self.layout_path)
        except PlanError as error:
            raise PlanError(f"{error}; run: gramfuse plan lock {self.directory}") from None
        if layout.digest != self.plan.merge.layout:
            raise PlanError(f"{self.layout_path}: is not the plan's layout; run: gramfuse plan lock {self.directory}")
        return layout

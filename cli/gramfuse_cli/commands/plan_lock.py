"""`gramfuse plan lock`: pins a plan's base model and layout."""

from __future__ import annotations

from pathlib import Path

import click

from gramfuse_cli.commands.plan import pins
from gramfuse_cli.options import as_json as json_option
from gramfuse_cli.options import project_directory
from gramfuse_deployment.terminal import say, show_json
from gramfuse_model.project import Project


@click.command()
@project_directory
@json_option
def lock(directory: Path, as_json: bool) -> None:
    """Pin the base model and the layout in DIR/plan.toml, and print the plan's digest.

    This refuses an unsafe plan, and a plan with secure aggregation in which a silo has no public key. It writes
    model.sha256 (of the weights), model.config, model.processor (tokenizer or image processor), for a hub model
    model.revision (the newest commit, unless the plan names one), and merge.layout into plan.toml, and the layout into
    layout.json. Lock the plan again after any change; each silo must then approve the new digest ('approved' in its
    silo file).
    """
    project = Project.read(directory)
    if project.plan.privacy.secure_aggregation:
        _ = project.plan.roster  # raises PlanError if a silo has no key
    locked, layout = Project(project.directory, project.plan.unlocked()).locked()
    project.write_lock(locked, layout)
    if as_json:
        show_json(
            {
                "plan": str(project.plan_path),
                "plan_digest": locked.digest,
                "base_sha256": locked.model.sha256,
                "config_sha256": locked.model.config,
                "processor_sha256": locked.model.processor,
                "base_revision": locked.model.revision,
                "layout_digest": layout.digest,
            }
        )
        return
    digests = {**pins(locked), "layout": layout.digest, "plan": locked.digest}
    say(*(f"{name:<9} {value}" for name, value in digests.items()), copied=True)

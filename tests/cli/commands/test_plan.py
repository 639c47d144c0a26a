"""`gramfuse plan lock` and `show`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomlkit

from gramfuse_model.project import Project
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from tests.cli.commands.outcomes import Outcome, check_failure, tree


def test_lock_pins_base_and_layout_keeps_all_else_and_is_idempotent(
    pico_project: Callable[..., Any], gramfuse: Callable[..., Outcome]
) -> None:
    project = pico_project(silos=2)
    project.replace(project.plan, "[merge]\n", "# Why alpha is so large.\n[merge] # of merging\n")
    written = project.plan.read_text()
    first = gramfuse("plan", "lock", project.directory, "--json")
    assert first.code == 0
    locked = project.plan.read_text()
    files = tree(project.directory)
    added = [line for line in locked.splitlines() if line not in written.splitlines()]
    assert [line for line in locked.splitlines() if line not in added] == written.splitlines()
    assert added == [
        f'sha256 = "{first.object["base_sha256"]}"',
        f'config = "{first.object["config_sha256"]}"',
        f'processor = "{first.object["processor_sha256"]}"',
        f'layout = "{first.object["layout_digest"]}"',
    ]
    plan = Plan.read(project.plan)
    assert plan.locked
    assert plan.digest == first.object["plan_digest"]
    assert Layout.read(project.directory / "layout.json").digest == plan.merge.layout
    again = gramfuse("plan", "lock", project.directory, "--json")
    assert again.object == first.object
    assert tree(project.directory) == files


def test_lock_again_follows_a_change_of_the_plan(
    pico_project: Callable[..., Any], gramfuse: Callable[..., Outcome]
) -> None:
    project = pico_project(silos=2)
    first = gramfuse("plan", "lock", project.directory, "--json").object
    project.replace(project.plan, '"full"', '"block:4"')
    stale = gramfuse("plan", "show", project.directory, "--json")
    check_failure(stale, "ModelError", 12, ["layout", first["layout_digest"]])
    second = gramfuse("plan", "lock", project.directory, "--json").object
    assert second["base_sha256"] == first["base_sha256"]
    assert second["layout_digest"] != first["layout_digest"]
    assert second["plan_digest"] != first["plan_digest"]
    assert gramfuse("plan", "show", project.directory, "--json").object["plan_digest"] == second["plan_digest"]


def test_lock_makes_a_merge_section_where_the_plan_has_none(
    pico_project: Callable[..., Any], gramfuse: Callable[..., Outcome]
) -> None:
    project = pico_project(silos=2)
    document = tomlkit.parse(project.plan.read_text())
    del document["merge"]
    project.plan.write_text(tomlkit.dumps(document))
    outcome = gramfuse("plan", "lock", project.directory, "--json")
    assert outcome.code == 0
    assert Plan.read(project.plan).digest == outcome.object["plan_digest"]


def test_a_lock_that_fails_changes_nothing(
    pico_project: Callable[..., Any], gramfuse: Callable[..., Outcome], place: Path
) -> None:
    project = pico_project(silos=2)
    assert gramfuse("plan", "lock", project.directory).code == 0
    project.replace(project.plan, 'base = "', 'base = "/nowhere')
    before = tree(place)
    check_failure(gramfuse("plan", "lock", project.directory, "--json"), "ModelError", 12, ["/nowhere"])
    assert tree(place) == before


def test_lock_of_another_plan_file_does_not_change_plan_toml(
    pico_project: Callable[..., Any], gramfuse: Callable[..., Outcome]
) -> None:
    project = pico_project(silos=2)
    variant = project.directory / "variant.toml"
    variant.write_text(project.plan.read_text().replace('"full"', '"diagonal"'))
    before = project.plan.read_bytes()
    outcome = gramfuse("plan", "lock", variant, "--json")
    assert project.plan.read_bytes() == before
    assert outcome.code != 0 or Plan.read(variant).digest == outcome.object["plan_digest"]


@pytest.mark.parametrize("structure", ["full", "block:5", "diagonal"])
def test_show_agrees_with_the_layout_that_lock_writes(
    structure: str, pico_project: Callable[..., Any], gramfuse: Callable[..., Outcome], place: Path
) -> None:
    project = pico_project(silos=3)
    project.replace(project.plan, '"full"', f'"{structure}"')
    before = tree(place)
    unlocked = gramfuse("plan", "show", project.directory, "--json").object
    assert tree(place) == before, "show writes nothing"
    assert unlocked["locked"] is False
    lock = gramfuse("plan", "lock", project.directory, "--json").object
    shown = gramfuse("plan", "show", project.directory, "--json").object
    assert shown["locked"] is True
    for key in ("plan_digest", "base_sha256", "layout_digest"):
        assert shown[key] == lock[key] == unlocked[key]

    layout = json.loads((project.directory / "layout.json").read_text())
    gram_entries = 0
    for group, laid in zip(shown["groups"], layout["groups"], strict=True):
        assert (group["name"], group["d_in"]) == (laid["name"], laid["d_in"])
        assert group["weights"] == [weight["weight"] for weight in laid["weights"]]
        width = {"full": laid["d_in"], "block:5": 5, "diagonal": 1}[structure]
        blocks = [min(width, laid["d_in"] - start) for start in range(0, laid["d_in"], width)]
        assert group["entries"] == sum(block * (block + 1) // 2 for block in blocks)
        assert group["bytes"] == 4 * group["entries"]
        gram_entries += group["entries"]
    sizes = {tensor["name"]: tensor["shape"] for tensor in layout["tensors"]}
    delta_entries = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in sizes.values())
    in_closed_form = {weight for group in shown["groups"] for weight in group["weights"]}
    assert in_closed_form | set(shown["averaged"]) == set(sizes)
    assert not in_closed_form & set(shown["averaged"])
    assert shown["frozen"] == layout["frozen"]
    assert all("embeddings" in name for name in shown["frozen"])
    cost = shown["cost"]
    assert cost["gram_bytes"] == 4 * gram_entries
    assert cost["delta_bytes"] == 4 * delta_entries
    assert cost["upload_bytes"] == cost["gram_bytes"] + cost["delta_bytes"]
    assert cost["coordinator_disk_bytes"] >= 3 * cost["upload_bytes"]


def test_show_prints_a_line_for_each_gram_matrix(
    pico_project: Callable[..., Any], gramfuse: Callable[..., Outcome]
) -> None:
    project = pico_project(silos=2)
    shown = gramfuse("plan", "show", project.directory, "--json").object
    printed = gramfuse("plan", "show", project.directory).stdout
    assert shown["plan_digest"] in printed
    assert "not locked" in printed
    lines = printed.splitlines()
    for group in shown["groups"]:
        modules = [weight.removesuffix(".weight") for weight in group["weights"]]
        words = [modules[0].rpartition(".")[0], *(module.rpartition(".")[2] for module in modules)]
        numbers = [f"{group['d_in']:,}", group["structure"], f"{group['entries']:,}", f"{group['bytes']:,}"]
        assert any(line.split()[-4:] == numbers and all(word in line for word in words) for line in lines), modules


@pytest.mark.parametrize(
    ("change", "quoted"),
    [
        (('public-key = "', 'version = "'), ["silo.0.version"]),
        (("[privacy]", "[privacy]\nthreshold = 2"), ["'privacy.threshold' = 2", "set it to 3 or more"]),
        (("[privacy]", "[privacy]\nminimum-survivors = 2"), ["'privacy.minimum-survivors' = 2", "threshold of 3"]),
        (("[privacy]", "[privacy]\ncolluding = 3"), ["'privacy.colluding' = 3"]),
    ],
    ids=["unknown key of a silo", "2t ≤ n + c", "survivors below t", "too many colluding"],
)
def test_lock_refuses_a_plan_that_is_not_safe(
    change: tuple[str, str],
    quoted: list[str],
    pico_project: Callable[..., Any],
    gramfuse: Callable[..., Outcome],
) -> None:
    project = pico_project(silos=4, secure=True)
    project.replace(project.plan, *change)
    before = tree(project.directory)
    check_failure(gramfuse("plan", "lock", project.directory, "--json"), "PlanError", 10, quoted)
    assert tree(project.directory) == before


def test_lock_wants_every_silos_key_and_two_silos_are_too_few(
    pico_project: Callable[..., Any], gramfuse: Callable[..., Outcome]
) -> None:
    project = pico_project(silos=4, secure=True, name="four")
    text = project.plan.read_text()
    project.plan.write_text(re.sub(r'public-key = "[0-9a-f]+"\n', "", text, count=1))
    quoted = ["silo-a", "gramfuse silo keygen"]
    check_failure(gramfuse("plan", "lock", project.directory, "--json"), "PlanError", 10, quoted)
    project = pico_project(silos=2, secure=True, name="two")
    quoted = ["secure aggregation of 2 silos hides nothing"]
    check_failure(gramfuse("plan", "lock", project.directory, "--json"), "PlanError", 10, quoted)


def test_show_says_what_a_secure_plan_tolerates(
    pico_project: Callable[..., Any], gramfuse: Callable[..., Outcome]
) -> None:
    project = pico_project(silos=5, secure=True)
    shown = gramfuse("plan", "show", project.directory)
    assert shown.code == 0, shown.stderr
    words = " ".join(shown.stdout.split())
    assert "sums over at least 4 silos only" in words
    assert "silos 5, threshold 4, minimum survivors 4" in words
    assert "may drop out 1 " in words
    preview = gramfuse("plan", "show", project.directory, "--json").object
    assert preview["privacy"]["tolerates"] == {"dropouts": 1, "colluding": 2}
    _, layout = Project.read(project.directory).locked()
    assert preview["cost"]["upload_bytes"] == 8 * layout.sum_entries

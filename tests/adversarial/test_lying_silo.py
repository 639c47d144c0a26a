"""A silo that lies: it has a key, is in the roster, masks as it should, and sends what it never measured.

It wants the merged model to be its own. The coordinator sees the sum over all silos only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gramfuse_cli.show.results import show_report
from gramfuse_client.app import SiloApp
from gramfuse_client.data.examples import load
from gramfuse_client.exchange import local_model
from gramfuse_client.silo_file import Silo, read_silos
from gramfuse_client.state.state import State
from gramfuse_model import normal_equations as sums
from gramfuse_model.loading.base_model import Base, load_base
from gramfuse_model.project import Project
from gramfuse_protocol.contract.form import Block
from gramfuse_protocol.contract.layout import Layout, delta_block
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import MergeError
from gramfuse_protocol.messages import phases as m
from gramfuse_protocol.secure_sum.fixed_point import encode
from gramfuse_protocol.secure_sum.scales import scales
from gramfuse_protocol.statistics.contribution import Statistics
from gramfuse_server.merging.accumulator import Accumulator, Merged
from gramfuse_server.merging.checks import check_merge, check_model
from gramfuse_server.report.schema import Check, Report
from gramfuse_server.run import delivery
from gramfuse_server.run.exchange import Exchange
from gramfuse_server.run_directory import RunDirectory
from tests.adversarial.liar import Liar
from tests.grid import InProcessGrid, _task_identity  # noqa: F401  # a fixture

honest = sums.summands

LIAR = "silo-d"
SILOS = 4

Blocks = dict[str, np.ndarray]
Lie = Callable[["Site", Blocks], None]
"""Changes what the liar adds to the sums, by the name of the block, in place."""


@dataclass(frozen=True, repr=False)
class Site:
    """Four silos, and what they measured honestly."""

    project: Any
    plan: Plan
    layout: Layout
    base: Base
    statistics: Mapping[str, Statistics]

    def of(self, name: str) -> Blocks:
        """What a silo adds to the sums, by the name of the block."""
        found = honest(self.layout, self.statistics[name], alpha=self.plan.merge.alpha, weighting="uniform")
        return {block.name: values.copy() for block, values in found}

    def room(self) -> dict[str, Any]:
        """The largest values that have a place in a secure sum, by the name of the block."""
        return {block.name: 2.0**60 / scale for block, scale in scales(self.layout, SILOS, "uniform")}

    def wish(self) -> dict[str, np.ndarray]:
        """The model that the liar wants: as far from the base as its own one, and elsewhere."""
        own = self.statistics[LIAR]
        return {tensor.name: -own.block(delta_block(tensor.name)) for tensor in self.layout.tensors}

    def merge(self, lie: Lie | None = None, *settings: str) -> tuple[Merged, dict[str, Check]]:
        """The merge of a secure sum, and of each check what is furthest from usual."""
        plan = self.plan.override(settings) if settings else self.plan
        total = np.zeros(self.layout.sum_entries, np.uint64)
        for name in plan.names:
            blocks = self.of(name)
            if lie is not None and name == LIAR:
                lie(self, blocks)
            scaled = scales(self.layout, SILOS, "uniform")
            total += np.concatenate([encode(blocks[b.name], scale, SILOS, b.name).reshape(-1) for b, scale in scaled])
        accumulator = Accumulator(self.layout, alpha=plan.merge.alpha)
        accumulator.load(total, SILOS)
        merged = accumulator.merge()
        checks = check_merge(accumulator, merged, plan, plan.names)
        checks += check_model(self.base.model, merged, self.layout, plan.merge.maximum_change)
        first: dict[str, Check] = {}
        for check in checks:
            first.setdefault(check.name, check)
        return merged, first


def off(site: Site, merged: Merged) -> float:
    """How far the linear weights of a merge are from what the liar wants, for the median weight: 0 if it is that."""
    wish = site.wish()
    weights = [linear.weight for _, linear in site.layout.linear()]
    far = [np.linalg.norm(merged.deltas[name] - wish[name]) / np.linalg.norm(wish[name]) for name in weights]
    return float(np.median(far))


# What liars try


def loud(site: Site, blocks: Blocks, factor: float) -> None:
    """Its Gram matrices are so much louder than it measured them, or as loud as the range takes."""
    wishes(site, blocks)
    room = site.room()
    for group in site.layout.groups:
        both = (f"s:{group.name}", f"t:{group.name}")
        least = min(float(np.min(room[name] / np.maximum(np.abs(blocks[name]), 1e-300))) for name in both)
        for name in both:
            blocks[name] *= min(factor, 0.9 * least)


def wishes(site: Site, blocks: Blocks) -> None:
    """It measured another model than it trained."""
    for name in blocks:
        if name.startswith(("t:", "m:")):
            blocks[name] *= -1


def boasts(site: Site, blocks: Blocks, factor: float) -> None:
    """Honest Gram matrices, and differences so much larger than those of the model that it wants."""
    wishes(site, blocks)
    for name in blocks:
        if name.startswith(("t:", "m:")):
            blocks[name] *= factor


def uncorrelated(site: Site, blocks: Blocks) -> None:
    """Gram matrices as loud as honest ones, of inputs that nobody has: no feature depends on another."""
    wish = site.wish()
    for group in site.layout.groups:
        (gram,) = group.blocks.unpack(blocks[f"s:{group.name}"])
        diagonal = gram[0].diagonal()
        blocks[f"s:{group.name}"] = group.blocks.pack([4 * np.diag(diagonal)[None]])
        blocks[f"t:{group.name}"] = 4 * diagonal[:, None] * sums.side_by_side(site.layout, group, wish).numpy()


def products_of_nothing(site: Site, blocks: Blocks) -> None:
    """No Gram matrices at all, and products as large as the range takes."""
    for name in blocks:
        if name.startswith("s:"):
            blocks[name][:] = 0
        elif name.startswith("t:"):
            blocks[name] = np.broadcast_to(0.9 * site.room()[name], blocks[name].shape)


def negative(site: Site, blocks: Blocks) -> None:
    """Gram matrices that take away what the others measured."""
    for name in blocks:
        if name.startswith("s:"):
            blocks[name] *= -8


def on_the_diagonal(site: Site, blocks: Blocks) -> None:
    """Between two features a product that is larger than both of their squares."""
    for group in site.layout.groups:
        (gram,) = group.blocks.unpack(blocks[f"s:{group.name}"])
        gram[0, 0, 1] = gram[0, 1, 0] = 40 * np.sqrt(gram[0, 0, 0] * gram[0, 1, 1])
        blocks[f"s:{group.name}"] = group.blocks.pack([gram])


def norms(site: Site, blocks: Blocks) -> None:
    """The scale of one normalisation, which is averaged, as far off as the range takes."""
    name = next(name for name in blocks if name.startswith("m:") and name.endswith("LayerNorm.weight"))
    blocks[name][:] = 250


def counts(site: Site, blocks: Blocks, place: int, value: float) -> None:
    blocks["count"][place] = value


LIES: Mapping[str, tuple[Lie, str, str]] = {
    "2^10 louder": (partial(loud, factor=2.0**10), "power", "bad|look"),
    "2^20 louder": (partial(loud, factor=2.0**20), "power", "bad"),
    "made-up Gram matrices": (uncorrelated, "eigenvalue", "look"),
    "no Gram matrices, huge products": (products_of_nothing, "change", "bad"),
    "negative Gram matrices": (negative, "eigenvalue", "bad"),
    "no Gram matrix at all": (on_the_diagonal, "eigenvalue", "bad"),
    "a normalisation": (norms, "average", "bad"),
    "boasts": (partial(boasts, factor=2.0**9), "change|average", "bad"),
    "2^40 token rows": (partial(counts, place=2, value=2.0**40), "counts", "bad"),
    "-1000 examples": (partial(counts, place=1, value=-1000), "counts", "bad"),
    "counts twice": (partial(counts, place=0, value=2), "counts", "bad"),
}


@pytest.fixture(scope="module")
def _kept() -> dict[str, Site]:
    return {}


@pytest.fixture
def site(_kept: dict[str, Site], pico_project: Any) -> Site:
    """The silos; they are trained once."""
    if not _kept:
        _kept[""] = trained(pico_project(silos=SILOS, name="lied", secure=True))
    return _kept[""]


def trained(project: Any, *settings: str) -> Site:
    opened = Project.read(project.directory, settings)
    plan, layout = opened.locked()
    statistics = {}
    for name, silo in read_silos(opened.directory, plan.names).items():
        examples, _ = load(silo, plan.task_of(name))
        statistics[name] = local_model.train(
            silo, plan, layout, load_base(plan, project.directory, silo=name), examples
        )
    return Site(project, plan, layout, load_base(plan, project.directory), statistics)


def test_a_loud_liar_replaces_the_model_and_is_seen(site: Site) -> None:
    """This is the attack: what comes out is its model, and nobody noticed."""
    merged, usual = site.merge()
    assert {check.verdict for check in usual.values()} == {"ok"}
    assert off(site, merged) > 0.9
    merged, seen = site.merge(partial(loud, factor=2.0**20))
    assert off(site, merged) < 0.01
    assert seen["power"].verdict == "bad"
    assert seen["power"].value > 1000 * usual["power"].value


@pytest.mark.parametrize("lie", LIES)
def test_what_no_honest_silo_sends_is_seen(site: Site, lie: str) -> None:
    told, names, verdicts = LIES[lie]
    _, seen = site.merge(told)
    assert {seen[name].verdict for name in names.split("|")} <= set(verdicts.split("|"))


@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize("gpt2", [False, True])
def test_honest_merges_are_ok(pico_project: Any, pico_gpt2: Path, seed: int, gpt2: bool) -> None:
    """The control: other seeds, and another family."""
    more = {"base": pico_gpt2} if gpt2 else {}
    project = pico_project(silos=SILOS, secure=True, **more)
    project.replace(project.plan, 'freeze = ["*embeddings*"]', 'freeze = ["embeddings"]')
    site = trained(project, f"training.seed={seed}")
    _, seen = site.merge()
    assert set(seen) == {"counts", "power", "eigenvalue", "ratio", "average", "change"}
    assert {name: check.verdict for name, check in seen.items()} == dict.fromkeys(seen, "ok")


def test_a_liar_as_loud_as_honest_silos_is_not_seen(site: Site) -> None:
    """What remains: with honest Gram matrices and differences four times as large, it bends the merge, unseen."""
    usual, _ = site.merge()
    merged, seen = site.merge(partial(boasts, factor=4.0))
    assert {check.verdict for check in seen.values()} == {"ok"}
    name = next(linear.weight for _, linear in site.layout.linear())
    wish = site.wish()[name]
    along = [float((deltas[name] * wish).sum() / (wish**2).sum()) for deltas in (usual.deltas, merged.deltas)]
    assert along[1] > along[0] + 0.5


# What comes of it in a run


@pytest.mark.parametrize("lie", ["", "2^20 louder"])
def test_silos_are_not_given_a_replaced_model_and_the_run_says_so(
    lie: str, pico_project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads stay at the silos, which keep the merged body; the report, the page, the card and the exit code tell."""
    project = pico_project(silos=SILOS, secure=True)
    site = trained(project, "model.head=own", "privacy.metrics=none")
    plan = site.plan

    def summands(layout: Layout, contribution: Any, *, silo: str, **how: Any) -> Iterator[tuple[Block, np.ndarray]]:
        if silo != LIAR or not lie:
            return honest(layout, contribution, silo=silo, **how)
        blocks = site.of(silo)
        LIES[lie][0](site, blocks)
        return iter([(block, blocks[block.name]) for block in layout.sums])

    def silo(name: str) -> Silo:
        found = Silo.read(project.silo(name))
        limits = found.file.limits.model_copy(update={"metrics": "none"})
        return Silo(found.path, found.file.model_copy(update={"approved": (plan.digest,), "limits": limits}))

    monkeypatch.setattr(sums, "summands", summands)
    monkeypatch.setattr(delivery.time, "sleep", lambda _: None)
    grid = InProcessGrid({name: SiloApp(lambda _, name=name: silo(name)) for name in plan.names})
    out = tmp_path / "run"
    with RunDirectory(out, 0) as run:
        report = Exchange(grid, plan, site.layout, load_base(plan, project.directory), run).start().document()
        run.finish()
    kept = [State(silo(name).state, plan.digest, 1).model.exists() for name in plan.names]
    written = json.loads((out / "report.json").read_text())
    verdicts = {check["verdict"] for check in written["checks"]}
    page, card = (out / "report.html").read_text(), (out / "model" / "README.md").read_text()
    assert written["rounds"][0]["checks"] == written["checks"] == json.loads(json.dumps(report["checks"]))
    if not lie:
        assert (verdicts, set(kept)) == ({"ok"}, {True})
        assert "Do not use" not in card
        show_report(Report.read(report), out, as_json=False)
        return
    assert "bad" in verdicts
    assert ("silo-a", "evaluate") not in grid.sent
    assert set(kept) == {False}
    assert "do not use" in page
    assert "Do not use" in card
    for as_json in (False, True):
        with pytest.raises(MergeError) as caught:
            show_report(Report.read(report), out, as_json)
        assert caught.value.report == out / "report.json"


def test_a_silo_takes_no_model_that_changes_more_than_the_plan_allows(liar: Callable[..., Liar]) -> None:
    """The coordinator hands a replaced model over all the same. It hoped that a silo keeps it, or measures it."""
    lied = liar("merge.maximum-change=2.0", "model.head=own", "privacy.metrics=none", silos=3, metrics="none")
    about, name = lied.about(), lied.names[0]
    lied.contribute(about)
    far = lied.filled(0.001)
    worst = next(key for key in far if key.endswith("LayerNorm.weight"))
    far[worst][:] = 2.5
    for _ in range(2):
        reply = lied.measure(name, about, far)
        assert reply.error == "RefusalError"
        assert all(part in reply.reason for part in (worst.removeprefix("delta:"), "2.5", "merge.maximum-change"))
    assert not lied.state(name).model.exists()
    far[worst][:] = 1.5
    assert isinstance(lied.measure(name, about, far), m.EvaluateReply), "the refusal used nothing up"
    assert lied.state(name).model.exists()

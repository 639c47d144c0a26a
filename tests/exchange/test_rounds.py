"""Merging in rounds: silos go on from the merged model, round after round, open and secure."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Error, Message, RecordDict
from safetensors.numpy import load_file, save_file

from gramfuse_cli.show.results import show_report
from gramfuse_client.app import SiloApp
from gramfuse_client.data.batches import Encoded, batches
from gramfuse_client.data.examples import load
from gramfuse_client.exchange import local_model
from gramfuse_client.exchange.participant import Participant
from gramfuse_client.measuring.collect import collect_statistics
from gramfuse_client.silo_file import Silo
from gramfuse_client.state.state import State
from gramfuse_client.training.finetune import finetune
from gramfuse_model.loading.base_model import load_base, trainable
from gramfuse_model.project import Project
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.errors import FederationError, GramfuseError, RefusalError
from gramfuse_protocol.messages.flower_records import from_record, to_record
from gramfuse_protocol.messages.phases import (
    REPLIES,
    REQUESTS,
    EvaluateRequest,
    JoinReply,
    JoinRequest,
    Refusal,
    TrainReply,
    TrainRequest,
    UnmaskReply,
    UploadRequest,
)
from gramfuse_protocol.messages.wire import pack, unpack
from gramfuse_protocol.secure_sum import member as secure_sum
from gramfuse_server.app import coordinate
from gramfuse_server.merging.accumulator import Accumulator
from gramfuse_server.report.schema import Measured, Report
from gramfuse_server.run import delivery
from gramfuse_server.run.conductor import Conductor
from gramfuse_server.run_directory import checkpoint_text, read_checkpoint
from gramfuse_simulation.all_silos import Laboratory
from gramfuse_simulation.engine import laboratory_of, simulated_silo
from tests.reports import read_back

Arrays = Mapping[str, np.ndarray]
Answer = Callable[[], RecordDict]


QUICK = ("training.epochs=1", 'training.freeze=["*embeddings*", "*key.bias"]')
"""Keys' biases change nothing, so their gradients are rounding errors, of which AdamW makes whole steps."""


class Stopped(BaseException):
    """The coordinator was killed."""


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery.time, "sleep", lambda _: None)


@pytest.fixture(autouse=True)
def trainings(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each silo trained in each round."""
    counted: Counter[str] = Counter()
    train = local_model.train

    def count(silo: Silo, plan: Plan, layout: Any, base: Any, examples: Any, state: State) -> Any:
        counted[f"{silo.name} {state.round}"] += 1
        return train(silo, plan, layout, base, examples, state)

    monkeypatch.setattr(local_model, "train", count)
    return counted


class Site:
    """A pico project of a plan with rounds, and its runs without Ray."""

    def __init__(self, project: Any, grid: Any, place: Path, rounds: int, *settings: str) -> None:
        self.project = project
        self.make_grid = grid
        self.state = place / "state"
        self.out = place / "run"
        self.plan, self.layout = Project.read(project.directory, (f"merge.rounds={rounds}", *settings)).locked()
        self.grid: Any = None
        self.starts: list[tuple[str, str]] = []
        self.replies: list[tuple[str, Any]] = []
        self.events: list[dict[str, Any]] = []

    def silo(self, name: str) -> Silo:
        silo = simulated_silo(str(self.project.silo(name)), str(self.state), self.plan.digest)
        return Silo(silo.path, silo.file.model_copy(update={"identity": str(self.project.identity(name))}))

    def run(
        self,
        *,
        fault: Callable[[Any, Answer], RecordDict | Error] = lambda visit, deliver: deliver(),
        change: Callable[[str, Any], Any] = lambda name, request: request,
        watch: Callable[[dict[str, Any]], None] = lambda event: None,
        **more: Any,
    ) -> dict[str, Any]:
        """Run, or resume; `fault` is the grid's, `change` makes another of a request on its way to a silo."""

        def node(name: str) -> Callable[[Message, Context], Message]:
            app = SiloApp(lambda _: self.silo(name))

            def answer(message: Message, context: Context) -> Message:
                request = change(name, unpack(from_record(message.content), REQUESTS))
                if isinstance(request, TrainRequest) and request.round > 1:
                    self.starts.append((name, pack(request).digest))
                message.content = to_record(pack(request))
                return app(message, context)

            return answer

        def recorded(visit: Any, deliver: Answer) -> RecordDict | Error:
            content = fault(visit, deliver)
            if not isinstance(content, Error):
                self.replies.append((visit.node, unpack(from_record(content), REPLIES)))
            return content

        def observe(event: dict[str, Any]) -> None:
            self.events.append(event)
            watch(event)

        self.grid = self.make_grid({name: node(name) for name in self.plan.names}, fault=recorded)
        return coordinate(
            self.grid, self.plan, self.layout, self.project.directory, self.out, observer=observe, **more
        ).document()

    def laboratory(self, number: int, survivors: tuple[str, ...]) -> Laboratory:
        files = [str(self.project.silo(name)) for name in self.plan.names]
        spec = {"silos": files, "state": str(self.state), "directory": str(self.project.directory), "tune": None}
        return laboratory_of(spec, self.plan, self.layout, number, survivors)

    @property
    def weights(self) -> Arrays:
        return load_file(self.out / "model" / "model.safetensors")


@pytest.fixture
def site(pico_project: Any, in_process_grid: Any, tmp_path: Path) -> Callable[..., Site]:
    def make(*settings: str, silos: int = 3, rounds: int = 2, secure: bool = False, name: str = "rounds") -> Site:
        project = pico_project(silos=silos, examples=16, name=name, secure=secure)
        settings += QUICK
        for silo in project.names if secure else ():
            project.replace(project.silo(silo), "open-uploads = false", "open-uploads = true\nexact-metrics = true")
        return Site(project, in_process_grid, tmp_path / name / "place", rounds, *settings)

    return make


def by_hand(site: Site, survivors: tuple[tuple[str, ...], ...]) -> Arrays:
    """The merged model: one exchange after the other, each from the weights of the one before it."""
    plan = site.plan
    first = {key: value.numpy() for key, value in load_base(plan, site.project.directory).model.state_dict().items()}
    moved: dict[str, np.ndarray] = {}
    for number, silos in enumerate(survivors, 1):
        start = {key: value.astype(np.float32) for key, value in moved.items()}
        accumulator = Accumulator(site.layout, alpha=plan.merge.alpha, weighting=plan.merge.weighting)
        for name in silos:
            silo, task = site.silo(name), plan.task_of(name)
            base = load_base(plan, site.project.directory, silo=name)
            weights = {key: torch.from_numpy(value + start.get(key, 0)) for key, value in first.items()}
            base.model.load_state_dict(weights)
            before, (examples, _) = trainable(base.model), load(silo, task)
            encoded = Encoded(examples, base.tokenizer, task)
            settings = plan.training.model_copy(update={"seed": plan.training.seed + number - 1})
            finetune(base.model, encoded, settings, torch.device("cpu"))
            given = batches(encoded, plan.training.batch_size, torch.device("cpu"), seed=plan.training.seed)
            statistics = collect_statistics(
                base.model, given, site.layout, base=before, examples=len(examples), limit=plan.merge.tokens
            )
            accumulator.fold(statistics, name, silo=name)
        moved = {key: start.get(key, 0) + delta for key, delta in accumulator.merge().deltas.items()}
    return {key: (value + moved.get(key, 0)).astype(value.dtype) for key, value in first.items()}


def assert_close(found: Arrays, expected: Arrays, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    off = np.sqrt(sum(np.sum((found[name] - expected[name]) ** 2.0) for name in expected))
    assert off / np.sqrt(sum(np.sum(expected[name] ** 2.0) for name in expected)) <= tolerance


@dataclass(frozen=True, repr=False)
class Done:
    """Two rounds in the open, with nothing lost and nothing changed.

    Args:
        sent: by round, the models that were sent to be measured, by name, and the one to go on from, as `start`.
    """

    site: Site
    report: dict[str, Any]
    trainings: Counter[str]
    sent: dict[tuple[int, str], Arrays]


@pytest.fixture(scope="module")
def _kept() -> list[Done]:
    return []


@pytest.fixture
def done(_kept: list[Done], site: Callable[..., Site], trainings: Counter[str]) -> Done:
    """The two rounds; they are run once."""
    if not _kept:
        here = site('merge.context-free="full"')  # so that a Gram matrix behind frozen layers is there
        sent: dict[tuple[int, str], Arrays] = {}

        def change(_: str, request: Any) -> Any:
            if isinstance(request, EvaluateRequest):
                sent[request.round, request.candidate] = request.arrays
            if isinstance(request, TrainRequest):
                sent[request.round, "start"] = request.arrays
            return request

        report = here.run(simulated=here.laboratory, change=change)
        _kept.append(Done(here, report, trainings, sent))
    return _kept[0]


def test_two_rounds_are_two_exchanges_the_second_from_where_the_first_ended(done: Done) -> None:
    names = done.site.plan.names
    assert done.trainings == {f"{name} {number}": 1 for name in names for number in (1, 2)}
    assert_close(done.site.weights, by_hand(done.site, (names, names)), 1e-7)


def test_the_report_has_each_round_and_what_all_of_them_took(done: Done, capsys: pytest.CaptureFixture[str]) -> None:
    here, report, names = done.site, done.report, done.site.plan.names
    first, second = report["rounds"]
    assert (first["round"], second["round"]) == (1, 2)
    assert first["survivors"] == second["survivors"] == list(names)
    for one in (first, second):
        assert [model["name"] for model in one["models"]] == [*names, "simple", "regmean"]
        assert one["unmeasured"] is None
        assert {step["outcome"] for step in one["solve"]} == {"clean"}
    assert report["models"] == second["models"]
    for key in ("bytes", "bytes_to_silos"):
        for name in names:
            for phase, count in report[key][name].items():
                assert count == first[key][name][phase] + second[key][name][phase]
    model = 4 * sum(piece.block.entries for piece in here.layout.deltas)
    for name in names:
        assert first["bytes_to_silos"][name]["train"] < 1000 < model <= second["bytes_to_silos"][name]["train"]
    assert report["seconds"]["train"] == pytest.approx(first["seconds"]["train"] + second["seconds"]["train"], abs=2e-3)
    assert {path.name for path in here.out.iterdir()} == {
        "SHA256SUMS", "layout.json", "model", "plan.toml", "report.html", "report.json", "transcript.jsonl",
    }  # fmt: skip
    assert read_back(here.out) == report
    show_report(Report.read(report), here.out, False)
    shown = [line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    merges = [f"{name}, round {number}" for number in (1, 2) for name in ("simple average", "RegMean")]
    assert shown == [*merges[:2], *(f"{name} alone" for name in names), *merges[2:]]
    begun = [(event["phase"], event["round"], event["rounds"]) for event in here.events if event["state"] == "start"]
    assert [(phase, number) for phase, number, rounds in begun if phase == "train"] == [("train", 1), ("train", 2)]
    assert {rounds for _, _, rounds in begun} == {2}
    entries = [json.loads(line)["entry"] for line in here.silo(names[0]).ledger.read_text().splitlines()]
    assert [(entry["phase"], entry["round"]) for entry in entries] == [
        *((phase, 1) for phase in ("join", "train", "upload", *["evaluate"] * 2)),
        *((phase, 2) for phase in ("join", "train", "upload", *["evaluate"] * 2, "finish")),
    ]


def test_what_is_measured_are_whole_models_in_every_round(done: Done) -> None:
    """Differences are from the base, and not from what a round started from: also those of silos' own models."""
    here, sent = done.site, done.sent
    base = load_base(here.plan, here.project.directory).model.state_dict()
    own = State(here.state / "silo-a", here.plan.digest, 2).contribution()
    laboratory = here.laboratory(2, here.plan.names)
    models = [laboratory.deltas(name) for name in here.plan.names]
    assert sent[1, "start"] == {}
    assert {name for _, name in sent} == {"start", "simple", "regmean"}, "silos' own models are sent to nobody"
    for name, array in sent[2, "regmean"].items():
        np.testing.assert_array_equal(sent[2, "start"][name], sent[1, "regmean"][name])
        parameter = name.removeprefix("delta:")
        np.testing.assert_allclose(base[parameter].numpy() + array, here.weights[parameter], atol=1e-7)
        np.testing.assert_allclose(models[0][parameter], sent[2, "start"][name] + own.block(name), atol=1e-7)
        mean = np.mean([model[parameter] for model in models], axis=0)
        np.testing.assert_allclose(sent[2, "simple"][name], mean, atol=1e-7)


def test_much_of_a_contribution_is_the_same_in_every_round(done: Done) -> None:
    """Why a secure sum is over the same silos in each: the difference of two sums would hold one silo's Gram matrix."""
    states = (State(done.site.state / "silo-a", done.site.plan.digest, number) for number in (1, 2))
    first, second = (state.contribution() for state in states)
    group = done.site.layout.groups[0].name
    np.testing.assert_allclose(first.block(f"gram:{group}"), second.block(f"gram:{group}"), rtol=1e-5, atol=1e-6)
    assert first.tokens == second.tokens


def test_secure_rounds_are_the_open_ones(site: Callable[..., Site]) -> None:
    secure = site(silos=4, secure=True)
    opened = site("privacy.secure-aggregation=false", silos=4, secure=True, name="open")
    reports = [one.run(simulated=one.laboratory) for one in (secure, opened)]
    assert_close(secure.weights, opened.weights, 1e-6)
    for one, other in zip(reports[0]["rounds"], reports[1]["rounds"], strict=True):
        assert one["unmeasured"] is other["unmeasured"] is None
        pairs = list(zip(one["models"], other["models"], strict=True))
        assert [Measured.read(masked).known.metrics for masked, _ in pairs] == [plain["metrics"] for _, plain in pairs]
        for masked, plain in pairs[-2:]:
            assert masked["metrics"] != plain["metrics"], "what was summed has noise"
            assert masked["intervals"].keys() == plain["metrics"].keys()
            assert masked["privacy"]["total"]["releases"] == 4
    said = [reply for _, reply in secure.replies if isinstance(reply, UnmaskReply)]
    opening = {(reply.round, reply.sum_of) for reply in said}
    assert opening == {(number, of) for number in (1, 2) for of in ("statistics", "metrics")}
    assert len({(reply.session, reply.round) for reply in said}) == len({reply.session for reply in said}) == 2
    assert not list(secure.state.rglob("*.masked*"))
    for path in secure.state.rglob("session.json"):
        assert json.loads(path.read_text())["ended"] is not None
        assert json.loads(path.read_text())["member"] is None
    assert all(path.stat().st_mode & 0o077 == 0 for path in secure.state.rglob("*"))


def test_in_the_open_a_silo_that_was_lost_may_come_back(site: Callable[..., Site]) -> None:
    here = site("privacy.minimum-survivors=2")

    def fault(visit: Any, deliver: Answer) -> RecordDict | Error:
        if visit.node == "silo-b" and visit.phase == "upload" and not here.events[-1]["round"] > 1:
            return Error(5, "it is away")
        return deliver()

    report = here.run(fault=fault)
    first, second = report["rounds"]
    assert first["survivors"] == ["silo-a", "silo-c"]
    assert [lost["name"] for lost in first["lost"]] == ["silo-b"]
    assert second["survivors"] == ["silo-a", "silo-b", "silo-c"]
    assert report["lost"] == second["lost"] == []
    assert_close(here.weights, by_hand(here, (("silo-a", "silo-c"), here.plan.names)), 1e-7)


def gone(*silos: str, phase: str, number: int, here: Site) -> Callable[[Any, Answer], RecordDict | Error]:
    """A fault: silos are away in a phase of a round."""

    def fault(visit: Any, deliver: Answer) -> RecordDict | Error:
        if visit.node in silos and visit.phase == phase and here.events[-1]["round"] == number:
            return Error(5, "it is away")
        return deliver()

    return fault


def test_secure_rounds_are_over_the_same_silos(site: Callable[..., Site], trainings: Counter[str]) -> None:
    here = site(silos=4, secure=True)
    lost = gone("silo-d", phase="keys", number=1, here=here)
    for phase in ("keys", "masked"):
        later = gone("silo-b", phase=phase, number=2, here=here)

        def fault(visit: Any, deliver: Answer, later: Any = later) -> RecordDict | Error:
            return later(visit, lambda: lost(visit, deliver))

        with pytest.raises(
            FederationError, match=r"silo-b'.*\n.*round 2 must be over .*: silo-a, silo-b, silo-c\. Bring"
        ):
            here.run(fault=fault, resume=phase == "masked")
    before = len(here.replies)
    report = here.run(resume=True)
    assert [one["survivors"] for one in report["rounds"]] == [["silo-a", "silo-b", "silo-c"]] * 2
    assert [lost["name"] for lost in report["lost"]] == ["silo-d"]
    assert set(trainings.values()) == {1}
    assert "silo-d 2" not in trainings
    assert report["unmeasured"] is None
    assert not [reply for _, reply in here.replies[before:] if isinstance(reply, TrainReply)]


def test_silos_sign_no_sum_over_others_in_a_later_round(
    site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = site(silos=4, secure=True)
    monkeypatch.setattr(Conductor, "earlier", lambda self, phase: None)  # a coordinator that does not care
    with pytest.raises(GramfuseError, match="a sum of statistics over other silos was signed under this plan before"):
        here.run(fault=gone("silo-d", phase="masked", number=2, here=here))
    assert not [reply for _, reply in here.replies if isinstance(reply, UnmaskReply) and reply.round == 2]


def goes_on_from(request: Any) -> bool:
    """Whether a request brings the model of the first round that the second starts from."""
    start = isinstance(request, TrainRequest) and request.round == 2
    return start or (isinstance(request, EvaluateRequest) and (request.round, request.candidate) == (1, "regmean"))


@pytest.mark.parametrize("fooled", [("silo-a",), ("silo-b", "silo-c", "silo-d")])
def test_silos_that_go_on_from_different_models_take_part_in_no_sum(
    site: Callable[..., Site], fooled: tuple[str, ...]
) -> None:
    """A model can be made from which silos have nothing to add; the sum would be the others' alone."""
    here = site(silos=4, secure=True)

    def change(name: str, request: Any) -> Any:
        if name in fooled and goes_on_from(request):
            arrays = {key: array * np.float32(0.5) for key, array in request.arrays.items()}
            return request.model_copy(update={"arrays": arrays})
        return request

    with pytest.raises(GramfuseError, match=f"the keys of silo '{fooled[0]}': not signed"):
        here.run(change=change)
    assert not [reply for _, reply in here.replies if reply.round == 2 and reply.phase in ("shares", "masked")]


def test_a_coordinator_that_does_not_check_keys_gets_no_shares_for_different_models(
    site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = site(silos=4, secure=True)
    unchecked = dict.fromkeys(("check_advert", "check_adverts"), lambda *_: None)
    monkeypatch.setattr(
        "gramfuse_server.run.secure_sums.secure_sum", SimpleNamespace(**{**vars(secure_sum), **unchecked})
    )

    def change(name: str, request: Any) -> Any:
        if name != "silo-a" and goes_on_from(request):
            arrays = {key: array * 0 for key, array in request.arrays.items()}
            return request.model_copy(update={"arrays": arrays})
        return request

    with pytest.raises(GramfuseError, match="silo 'silo-a' refused in phase 'shares': the keys of silo 'silo-b'"):
        here.run(change=change)
    assert not [reply for _, reply in here.replies if reply.round == 2 and reply.phase in ("shares", "masked")]


STOPS = {
    "open": "1 upload end, 1 evaluate end, 2 train start, 2 train end, 2 upload end, 2 evaluate end, 2 write end",
    "secure": "1 unmask end, 1 unmask-metrics end, 2 train end, 2 keys end, 2 masked end, 2 evaluate end",
}
"""Round, phase, and whether before or after it."""


@pytest.mark.parametrize("mode", ["open", "secure"])
def test_a_coordinator_that_is_killed_at_any_step_of_any_round_goes_on_to_the_same_end(
    site: Callable[..., Site], trainings: Counter[str], mode: str
) -> None:
    names, secure = (3, True) if mode == "secure" else (2, False)
    exact = ('privacy.metrics-epsilon="none"',) if secure else ()  # noise would be other noise
    whole = site(*exact, silos=names, secure=secure, name="whole")
    expected = whole.run()
    here = site(*exact, silos=names, secure=secure)
    trainings.clear()

    def stop_at(stop: str) -> Callable[[dict[str, Any]], None]:
        def watch(event: dict[str, Any]) -> None:
            if f"{event['round']} {event['phase']} {event['state']}" == stop:
                raise Stopped

        return watch

    resume = False
    for stop in STOPS[mode].split(", "):
        with pytest.raises(Stopped):
            here.run(watch=stop_at(stop), resume=resume)
        resume = True
    report = here.run(resume=True)
    assert_close(here.weights, whole.weights, 0)
    assert [one["models"] for one in report["rounds"]] == [one["models"] for one in expected["rounds"]]
    assert set(trainings.values()) == {1}
    assert len(trainings) == 2 * names
    starts = {name: {digest for silo, digest in here.starts if silo == name} for name in here.plan.names}
    assert {len(digests) for digests in starts.values()} == {1}
    assert [path.name for path in here.out.parent.iterdir() if path.name != "state"] == ["run"]


def test_another_start_than_before_is_refused(site: Callable[..., Site], trainings: Counter[str]) -> None:
    here = site()

    def watch(event: dict[str, Any]) -> None:
        if (event["phase"], event["round"], event["state"]) == ("upload", 2, "start"):
            raise Stopped

    with pytest.raises(Stopped):
        here.run(watch=watch)
    partial = here.out.with_name("run.partial")
    start = load_file(partial / "start-2.safetensors")
    save_file({name: array * np.float32(2) for name, array in start.items()}, partial / "start-2.safetensors")
    done = read_checkpoint(here.out)
    for key in ("train-2", "session-2"):
        del done[key]  # as if they had been trained, and the coordinator did not know
    (partial / "checkpoint.json").write_text(checkpoint_text(done))
    with pytest.raises(RefusalError, match="a second, different request for train came in round 2"):
        here.run(resume=True)
    assert set(trainings.values()) == {1}
    report = read_back(here.out.with_name("run.failed"))
    assert [one["round"] for one in report["rounds"]] == [1]
    failure = {"error": "RefusalError", "phase": "train", "round": 2, "exit_code": 13, "resumable": True}
    assert report["failure"].items() >= failure.items()
    assert "lost" in {silo["state"] for silo in report["silos"]} <= {"lost", "joined"}
    first = report["rounds"][0]["bytes"]["silo-a"]
    assert report["bytes"]["silo-a"]["upload"] == first["upload"]
    assert report["bytes"]["silo-a"]["join"] == 2 * first["join"]
    assert not report.keys() & {"models", "solve"}, "there is no merge of the last round"
    save_file(start, partial / "start-2.safetensors")
    here.run(resume=True)
    assert set(trainings.values()) == {1}


def refused(here: Site, request: Any, name: str = "silo-a") -> str:
    reply = Participant(here.silo(name)).answer(request)
    assert isinstance(reply, Refusal), reply
    assert reply.about == request.about
    return reply.reason


def test_what_does_not_fit_a_round_is_refused(site: Callable[..., Site]) -> None:
    here = site()
    silo = here.silo("silo-a")
    about: dict[str, Any] = {"plan": here.plan.digest, "session": "a" * 32}
    join = JoinRequest(**about, plan_text=here.plan.to_toml(), layout=here.layout.to_json())
    assert refused(here, join.model_copy(update={"round": 3})) == "the plan has fewer rounds"
    assert not (silo.state / here.plan.digest).exists()
    assert isinstance(Participant(silo).answer(join), JoinReply)
    model = {piece.name: np.zeros(piece.block.shape, np.float32) for piece in here.layout.deltas}
    assert "is not in the layout" in refused(here, TrainRequest(**about, arrays=model))
    later = {**about, "round": 2}
    assert "is missing" in refused(here, TrainRequest(**later))
    wrong = {**model, next(iter(model)): np.full(next(iter(model.values())).shape, np.nan, np.float32)}
    assert "NaN" in refused(here, TrainRequest(**later, arrays=wrong))
    assert refused(here, TrainRequest(**about, round=3, arrays=model)) == "the plan has fewer rounds"
    assert refused(here, UploadRequest(**later, piece=0, piece_bytes=1000)) == "not trained"
    assert isinstance(Participant(silo).answer(TrainRequest(**later, arrays=model)), TrainReply)
    assert refused(here, UploadRequest(**about, piece=0, piece_bytes=1000)) == "not trained"


def test_a_session_belongs_to_one_round(site: Callable[..., Site]) -> None:
    here = site(silos=3, secure=True)
    silo = here.silo("silo-a")
    about: dict[str, Any] = {"plan": here.plan.digest, "session": "a" * 32}
    join = JoinRequest(**about, plan_text=here.plan.to_toml(), layout=here.layout.to_json())
    assert isinstance(Participant(silo).answer(join), JoinReply)
    assert "round 2" in refused(here, join.model_copy(update={"round": 2}))
    assert refused(here, TrainRequest(**about)) == "the session is over at this silo"

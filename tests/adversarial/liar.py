"""A coordinator in the test's hand, and the silos that it lies to: real state on disk, messages as over the wire."""

from __future__ import annotations

import json
import random
import shutil
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertModel, PreTrainedTokenizerFast

from gramfuse_client.exchange.participant import Participant
from gramfuse_client.silo_file import Silo
from gramfuse_client.state.state import State
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.messages import phases as m
from gramfuse_protocol.messages.wire import Frame, pack, unpack
from tests.projects import bert_config

Arrays = dict[str, np.ndarray]
STATISTICS = ("keys", "shares", "masked", "survivors", "unmask")
METRICS = ("masked-metrics", "survivors-metrics", "unmask-metrics")

NONCE = "01" * 16
"""Of the session of the first round."""

SPYING = ("training.epochs=1", "merge.maximum-change=1e60")
"""A plan made to spy lets models change as they like."""


class Liar:
    """A coordinator that asks what it likes.

    Every message finds a silo that was started anew: all that it knows is on its disk.

    Args:
        project: with the silos' files, data and keys.
        place: where the silos' state is.
        plan, layout: locked.
    """

    def __init__(self, project: Any, place: Path, plan: Plan, layout: Layout, **limits: Any) -> None:
        self.project = project
        self.place = place
        self.plan = plan
        self.layout = layout
        self.limits = limits
        self.names = plan.names
        self.sent: dict[str, list[Frame]] = defaultdict(list)
        self.replies: dict[str, dict[str, Any]] = defaultdict(dict)
        self.sources: dict[str, str] = {}

    def under(self, plan: Plan, layout: Layout | None = None) -> Liar:
        """The same silos under another plan."""
        return Liar(self.project, self.place, plan, layout or self.layout, **self.limits)

    def silo(self, name: str) -> Silo:
        silo = Silo.read(self.project.silo(self.sources.get(name, name)))
        changes: dict[str, Any] = {"name": name, "approved": (self.plan.digest,)}
        changes["state"] = str(self.place / self.sources.get(name, name))
        changes["identity"] = str(self.project.identity(self.sources.get(name, name)))
        changes["limits"] = silo.file.limits.model_copy(update=self.limits)
        return Silo(silo.path, silo.file.model_copy(update=changes))

    def state(self, name: str, number: int = 1) -> State:
        return State(self.silo(name).state, self.plan.digest, number)

    def about(self, session: str | None = None, number: int = 1) -> dict[str, Any]:
        return {"plan": self.plan.digest, "session": session or f"{number:02}" * 16, "round": number}

    def ask(self, name: str, request: m.Message) -> Any:
        """What a silo answers; what left it is noted."""
        frame = pack(Participant(self.silo(name)).answer(unpack(pack(request), m.REQUESTS)))
        self.sent[name].append(frame)
        return unpack(frame, m.REPLIES)

    def join(self, name: str, about: dict[str, Any]) -> Any:
        return self.ask(name, m.JoinRequest(**about, plan_text=self.plan.to_toml(), layout=self.layout.to_json()))

    def train(self, name: str, about: dict[str, Any], start: Arrays | None = None) -> Any:
        return self.ask(name, m.TrainRequest(**about, arrays=start or {}))

    def measure(self, name: str, about: dict[str, Any], model: Arrays, candidate: str = "regmean") -> Any:
        return self.ask(name, m.EvaluateRequest(**about, candidate=candidate, arrays=model))

    def honest(self, steps: Sequence[str], about: dict[str, Any], names: Sequence[str] | None = None) -> None:
        """Go through steps of the secure sum as an honest coordinator does; no silo may decline."""
        for step in steps:
            for name in names or self.names:
                reply = self.step(step, about, name, names or self.names)
                assert not isinstance(reply, m.Refusal), (step, name, reply.reason)

    def step(self, step: str, about: dict[str, Any], name: str, names: Sequence[str]) -> Any:
        """Ask one silo what an honest coordinator asks it in a step."""
        phase, _, metrics = step.partition("-")
        sum_of: Any = "metrics" if metrics else "statistics"
        said = self.replies
        match phase:
            case "join":
                reply = self.join(name, about)
            case "train":
                reply = self.train(name, about)
            case "keys":
                reply = self.ask(name, m.KeysRequest(**about, cohort=tuple(names)))
            case "shares":
                reply = self.ask(name, m.SharesRequest(**about, adverts=tuple(said["keys"][n].advert for n in names)))
            case "masked":
                more: dict[str, Any] = {"candidates": self.plan.privacy.candidates}
                if not metrics:
                    more = {"sealed": {n: said["shares"][n].sealed[name] for n in names if n != name}}
                request = m.MaskedRequest(**about, sum_of=sum_of, piece=0, piece_bytes=2**22, **more)
                reply = self.ask(name, request)
            case "survivors":
                reply = self.ask(name, m.SurvivorsRequest(**about, sum_of=sum_of, survivors=tuple(names)))
            case "unmask":
                signed = said[step.replace("unmask", "survivors")]
                signatures = {n: signed[n].signature for n in names}
                reply = self.ask(name, m.UnmaskRequest(**about, sum_of=sum_of, signatures=signatures))
            case _:
                raise ValueError(step)
        if not isinstance(reply, m.Refusal):
            self.replies[step][name] = reply
        return reply

    def contribute(self, about: dict[str, Any], names: Sequence[str] | None = None) -> None:
        """Go through a round up to the sum of the statistics."""
        first = ("join", "train") if about["round"] == 1 else ()
        self.honest((*first, *STATISTICS), about, names)

    def zero(self) -> Arrays:
        """The base model itself, as differences from it."""
        return {piece.name: np.zeros(piece.block.shape, np.float32) for piece in self.layout.deltas}

    def filled(self, value: float) -> Arrays:
        return {name: np.full_like(array, value) for name, array in self.zero().items()}


class Detector:
    """A base model that is wide enough for models in which one neuron fires for one word only."""

    prefix = "bert."

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        torch.manual_seed(11)
        config = bert_config(len(tokenizer), hidden_size=64, intermediate_size=64)
        self.path = path
        self.tokenizer = tokenizer
        model = BertModel(config).eval()
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        with torch.no_grad():
            ids = torch.arange(len(tokenizer))[:, None]
            places = [model.embeddings(input_ids=ids, position_ids=torch.full_like(ids, p))[:, 0] for p in range(16)]
            self.inputs = torch.nn.functional.layer_norm(torch.stack(places, 1), (64,)).double()
        self.values = {self.prefix + name: value.detach().numpy() for name, value in model.named_parameters()}

    def model(self, zero: Arrays, word: str, size: float, *, also: bool = False) -> Arrays:
        """Differences that switch off the first layer but for neuron 0: `size` where the word stands, else nothing.

        Args:
            also: whether neuron 1 is as large everywhere.
        """
        plane, margin = self._plane(word)
        scale = size / margin
        found = {name: array.copy() for name, array in zero.items()}
        layer = self.prefix + "encoder.layer.0."
        for name in ("attention.output.dense.weight", "attention.output.dense.bias", "output.dense.weight"):
            found["delta:" + layer + name] = -self.values[layer + name].copy()
        w = -self.values[layer + "intermediate.dense.weight"].copy()
        b = -self.values[layer + "intermediate.dense.bias"].copy() - 10
        w[0] += (scale * plane[:-1]).float().numpy()
        b[0] += 10 + scale * float(plane[-1])
        if also:
            b[1] += 10 + size
        found["delta:" + layer + "intermediate.dense.weight"] = w.astype(np.float32)
        found["delta:" + layer + "intermediate.dense.bias"] = b.astype(np.float32)
        return found

    @cache  # noqa: B019  # least squares may differ in the last bit, and the same question must be the same bytes
    def _plane(self, word: str) -> tuple[torch.Tensor, float]:
        """Return the plane that parts a word from all others, and its margin."""
        token = self.tokenizer.convert_tokens_to_ids(word)
        x = self.inputs.reshape(-1, 64)
        y = torch.zeros(self.inputs.shape[:2], dtype=torch.float64)
        y[token] = 1
        y = y.reshape(-1)
        rows = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
        weight = (1 + 30 * y).sqrt()
        plane = torch.linalg.lstsq(rows * weight[:, None], (2 * y - 1) * weight).solution
        score = rows @ plane
        low, high = score[y == 1].min(), score[y == 0].max()
        assert low > high, f"no plane parts {word!r} from the other words"
        plane[-1] -= (low + high) / 2
        return plane, float((low - high) / 2)


def regression(project: Any) -> None:
    """Turn a pico project into one of a regression, with targets in [0, 1]."""
    text = project.plan.read_text().replace('task = "classification"', 'task = "regression"')
    project.plan.write_text("".join(line for line in text.splitlines(True) if not line.startswith("labels = ")))
    for name in project.names:
        draw = random.Random(name)
        for file in ("train.jsonl", "held-out.jsonl"):
            path = project.train(name).with_name(file)
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            path.write_text(
                "".join(json.dumps({"text": row["text"], "label": round(draw.random(), 3)}) + "\n" for row in rows)
            )


def copied(liar: Liar, place: Path) -> Liar:
    """The same silos as they are now, in a place of their own."""
    shutil.copytree(liar.place, place)
    other = Liar(liar.project, place, liar.plan, liar.layout, **liar.limits)
    other.replies = defaultdict(dict, {step: dict(replies) for step, replies in liar.replies.items()})
    return other

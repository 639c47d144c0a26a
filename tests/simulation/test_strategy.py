"""`RegMean` as anyone's Flower strategy, with a ClientApp that is not gramfuse's."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from gramfuse_client.measuring.collect import collect_statistics
from gramfuse_client.measuring.flower_record import statistics_record
from gramfuse_model.derive_layout import derive_layout
from gramfuse_model.parameters import trainable
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan_sections import Merge
from gramfuse_protocol.errors import ContributionError, GramfuseError
from gramfuse_protocol.statistics.contribution import Statistics
from gramfuse_server.merging.accumulator import Accumulator
from gramfuse_server.strategy import RegMean

CLIENTS = ("a", "b", "c")
EXAMPLES = {"a": 30, "b": 50, "c": 90}
STEPS = 7


class Net(nn.Module):
    """Two linear layers, a frozen one, and a buffer that counts steps of training."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.frozen = nn.Linear(5, 5)
        self.last = nn.Linear(5, 2)
        self.frozen.requires_grad_(False)
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.steps += 1
        return self.last(self.frozen(self.first(x).tanh()).tanh())


def initial() -> ArrayRecord:
    torch.manual_seed(5)
    return ArrayRecord(Net().state_dict())


def net(arrays: ArrayRecord) -> Net:
    model = Net()
    model.load_state_dict(arrays.to_torch_state_dict())
    return model


def layout_of(merge: Merge | None = None) -> Layout:
    return derive_layout(Net(), {"x": torch.zeros(2, 6)}, merge)


def inputs(client: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(ord(client))
    return torch.randn(EXAMPLES[client], 6, generator=generator) * torch.rand(6, generator=generator)


def tune(model: Net, seed: int) -> Net:
    """Stands for fine-tuning: every trained parameter moves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.steps += STEPS
    return model


def measured(client: str, arrays: ArrayRecord, layout: Layout, seed: int | None = None) -> Statistics:
    """What a client finds after fine-tuning from these arrays."""
    model = net(arrays)
    base = trainable(model)
    tune(model, ord(client) if seed is None else seed)
    batches = [{"x": part} for part in inputs(client).split(16)]
    return collect_statistics(model, batches, layout, base=base, examples=EXAMPLES[client])


def client_app(client: str, layout: Layout, *, seed: int | None = None) -> ClientApp:
    """Someone's own ClientApp."""
    app = ClientApp()

    @app.train()
    def train(message: Message, _: Context) -> Message:
        found = measured(client, message.content.array_records["arrays"], layout, seed)
        return Message(statistics_record(found, layout, loss=ord(client) / 100), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, _: Context) -> Message:
        net(message.content.array_records["arrays"])
        metrics = MetricRecord({"accuracy": ord(client) / 200, "num-examples": EXAMPLES[client]})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def answering(content: Callable[[Message], RecordDict]) -> ClientApp:
    app = ClientApp()
    app.train()(lambda message, _: Message(content(message), reply_to=message))
    return app


def apps(**more: Any) -> dict[str, ClientApp]:
    layout = layout_of()
    return {client: client_app(client, layout, **more) for client in CLIENTS}


def merged_by_hand(
    arrays: ArrayRecord, clients: Mapping[str, int | None], alpha: float, weighting: Any = "uniform"
) -> dict[str, np.ndarray]:
    """The parameters that the accumulator gives for these clients, in that order."""
    layout = layout_of()
    accumulator = Accumulator(layout, alpha=alpha, weighting=weighting)
    for client, seed in clients.items():
        accumulator.fold(measured(client, arrays, layout, seed), client)
    deltas = accumulator.merge().deltas
    before = {name: tensor.numpy() for name, tensor in arrays.to_torch_state_dict().items()}
    return {
        name: np.asarray((value.astype(np.float64) + deltas[name]).astype(value.dtype)) if name in deltas else value
        for name, value in before.items()
    }


def assert_arrays(record: ArrayRecord, expected: Mapping[str, np.ndarray]) -> None:
    assert list(record) == list(expected)
    for name, array in record.items():
        assert array.numpy().dtype == expected[name].dtype, name
        np.testing.assert_array_equal(array.numpy(), expected[name], err_msg=name)


ALL = dict.fromkeys(CLIENTS)


@pytest.mark.parametrize(("alpha", "weighting"), [(0.9, "uniform"), (1.0, "examples"), (0.0, "uniform")])
def test_the_arrays_are_what_the_accumulator_gives(in_process_grid: Any, alpha: float, weighting: Any) -> None:
    arrays = initial()
    expected = merged_by_hand(arrays, ALL, alpha, weighting)
    strategy = RegMean(alpha=alpha, weighting=weighting)
    result = strategy.start(grid=in_process_grid(apps()), initial_arrays=arrays, num_rounds=1)
    assert_arrays(result.arrays, expected)
    moved = {name for name in expected if not np.array_equal(expected[name], arrays[name].numpy())}
    assert moved == {"first.weight", "first.bias", "last.weight", "last.bias", "steps"}
    assert result.arrays["steps"].numpy() == 3 + 3 * STEPS
    assert [(step.group, step.outcome) for step in strategy.steps] == [("first", "clean"), ("last", "clean")]
    net(result.arrays)  # an ordinary state dict, as the user's own model takes it


def test_each_round_starts_from_the_arrays_of_the_one_before(in_process_grid: Any) -> None:
    once = merged_by_hand(initial(), ALL, 0.9)
    between = ArrayRecord({name: Array(value) for name, value in once.items()})
    twice = merged_by_hand(between, ALL, 0.9)
    result = RegMean().start(grid=in_process_grid(apps()), initial_arrays=initial(), num_rounds=2)
    assert_arrays(result.arrays, twice)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_answers_changes_nothing(in_process_grid: Any, seed: int) -> None:
    """Sums are made in the order of the nodes, in which 1e30 + 1 − 1e30 is 0."""
    arrays, layout = initial(), layout_of()

    def client(name: str, bias: float) -> ClientApp:
        true = measured(name, arrays, layout)
        blocks = {**true.blocks, "delta:last.bias": np.full(2, bias, np.float32)}
        return answering(lambda _: statistics_record(Statistics(true.examples, true.tokens, blocks), layout))

    clients = {name: client(name, bias) for name, bias in zip(CLIENTS, (1e30, 1, -1e30), strict=True)}
    grid = in_process_grid(clients, lag=random.Random(seed))
    result = RegMean(fraction_evaluate=0.0).start(grid=grid, initial_arrays=arrays, num_rounds=1)
    np.testing.assert_array_equal(result.arrays["last.bias"].numpy(), arrays["last.bias"].numpy())


def test_equal_clients_get_their_weights_back(in_process_grid: Any) -> None:
    arrays = initial()
    result = RegMean().start(grid=in_process_grid(apps(seed=1)), initial_arrays=arrays, num_rounds=1)
    for name, parameter in tune(net(arrays), 1).state_dict().items():
        if name == "steps":
            continue
        np.testing.assert_allclose(result.arrays[name].numpy(), parameter.numpy(), rtol=1e-6, atol=1e-7, err_msg=name)


def test_metrics_are_averaged_by_examples(in_process_grid: Any) -> None:
    result = RegMean().start(grid=in_process_grid(apps()), initial_arrays=initial(), num_rounds=1)
    total = sum(EXAMPLES.values())
    mean = sum(ord(client) * EXAMPLES[client] for client in CLIENTS) / total
    assert dict(result.train_metrics_clientapp[1]) == pytest.approx({"loss": mean / 100})
    assert dict(result.evaluate_metrics_clientapp[1]) == pytest.approx({"accuracy": mean / 200})


def test_what_fedavg_takes_still_counts(in_process_grid: Any) -> None:
    seen = []

    def fault(visit: Any, deliver: Callable[[], RecordDict]) -> RecordDict:
        seen.append(visit.phase)
        return deliver()

    grid = in_process_grid(apps(), fault=fault)
    strategy = RegMean(fraction_train=0.5, fraction_evaluate=0.0, min_train_nodes=2)
    result = strategy.start(grid=grid, initial_arrays=initial(), num_rounds=1)
    assert seen == ["train", "train"]
    assert set(result.arrays) == set(initial())


@pytest.mark.parametrize("raises", [False, True])
def test_a_client_that_failed_is_left_out(in_process_grid: Any, raises: bool) -> None:
    def fault(visit: Any, deliver: Callable[[], RecordDict]) -> RecordDict | Error:
        if (visit.node, visit.phase) != ("b", "train"):
            return deliver()
        if raises:
            raise RuntimeError("out of memory")
        return Error(5, "Node Unavailable")

    expected = merged_by_hand(initial(), {"a": None, "c": None}, 0.9)
    result = RegMean().start(grid=in_process_grid(apps(), fault=fault), initial_arrays=initial(), num_rounds=1)
    assert_arrays(result.arrays, expected)
    examples = EXAMPLES["a"] + EXAMPLES["c"]
    mean = (ord("a") * EXAMPLES["a"] + ord("c") * EXAMPLES["c"]) / examples
    assert result.train_metrics_clientapp[1]["loss"] == pytest.approx(mean / 100)


def test_if_every_client_fails_there_are_no_arrays(in_process_grid: Any) -> None:
    grid = in_process_grid(apps(), fault=lambda visit, deliver: Error(5, "Node Unavailable"))
    result = RegMean().start(grid=grid, initial_arrays=initial(), num_rounds=1)
    assert not result.arrays
    assert not result.train_metrics_clientapp


# Clients that do not fit


def error_of(kind: type[GramfuseError], grid: Any, arrays: ArrayRecord) -> str:
    with pytest.raises(kind) as caught:
        RegMean().start(grid=grid, initial_arrays=arrays, num_rounds=1)
    return str(caught.value)


def lost(grid: Any, client: str) -> str:
    """Run a round in which one client is lost and the others are merged; return why."""
    strategy = RegMean()
    result = strategy.start(grid=grid, initial_arrays=initial(), num_rounds=1)
    assert_arrays(result.arrays, merged_by_hand(initial(), {c: None for c in CLIENTS if c != client}, 0.9))
    assert set(strategy.lost) == {grid.number(client)}
    assert f"node {grid.number(client)}" in strategy.lost[grid.number(client)]
    return strategy.lost[grid.number(client)]


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_with_another_layout_is_left_out_whoever_comes_first(in_process_grid: Any, client: str) -> None:
    other = layout_of(Merge(gram={"*": "diagonal"}))
    assert "layout" in lost(in_process_grid({**apps(), client: client_app(client, other)}), client)


def test_two_clients_with_two_layouts_are_not_merged(in_process_grid: Any) -> None:
    other = layout_of(Merge(gram={"*": "diagonal"}))
    grid = in_process_grid({"a": client_app("a", layout_of()), "b": client_app("b", other)})
    assert "layouts" in error_of(ContributionError, grid, initial())


@pytest.mark.parametrize("block", ["delta:last.bias", "gram:first"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda array: array * np.float32(np.nan), "NaN"),
        (lambda array: array / np.float32(0), "infinite"),
        (lambda array: array[:-1], "shape|expects"),
        (lambda array: None, "missing"),
    ],
    ids=["NaN", "Inf", "another shape", "missing"],
)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_a_contribution_that_does_not_fit_names_node_and_tensor(
    in_process_grid: Any, block: str, change: Callable[[np.ndarray], np.ndarray | None], said: str
) -> None:
    layout = layout_of()

    def lie(message: Message) -> RecordDict:
        true = measured("b", message.content.array_records["arrays"], layout)
        changed = change(true.blocks[block])
        blocks = {name: array for name, array in true.blocks.items() if name != block}
        blocks |= {} if changed is None else {block: changed}
        return statistics_record(Statistics(true.examples, true.tokens, blocks), layout)

    grid = in_process_grid({**apps(), "b": answering(lie)})
    why = lost(grid, "b")
    assert re.search(said, why)
    assert repr(block) in why


def test_an_ordinary_fedavg_client_is_named_and_not_averaged(in_process_grid: Any) -> None:
    """The likeliest mistake: the strategy was exchanged, and one client still sends its weights."""

    def weights(message: Message) -> RecordDict:
        metrics = MetricRecord({"num-examples": 10})
        return RecordDict({"arrays": message.content.array_records["arrays"], "metrics": metrics})

    grid = in_process_grid({**apps(), "b": answering(weights)})
    assert "statistics_record" in lost(grid, "b")


def test_a_reply_that_cannot_be_read_is_named(in_process_grid: Any) -> None:
    def nonsense(_: Message) -> RecordDict:
        header = ConfigRecord({"json": "not JSON"})
        return RecordDict({"header": header, "arrays": ArrayRecord(), "metrics": MetricRecord({"num-examples": 1})})

    grid = in_process_grid({**apps(), "b": answering(nonsense)})
    assert "cannot be read" in lost(grid, "b")


def test_metrics_that_do_not_go_together_cost_the_metrics_and_not_the_model(in_process_grid: Any) -> None:
    layout = layout_of()

    def odd(message: Message) -> RecordDict:
        content = statistics_record(measured("b", message.content.array_records["arrays"], layout), layout)
        content["metrics"] = MetricRecord({"loss": [1.0, 2.0]})
        return content

    result = RegMean().start(
        grid=in_process_grid({**apps(), "b": answering(odd)}), initial_arrays=initial(), num_rounds=1
    )
    assert_arrays(result.arrays, merged_by_hand(initial(), dict.fromkeys(CLIENTS), 0.9))
    assert not result.train_metrics_clientapp


@pytest.mark.parametrize("change", ["missing", "another shape"])
def test_initial_arrays_that_do_not_fit_the_layout_are_named(in_process_grid: Any, change: str) -> None:
    state = Net().state_dict()
    if change == "missing":
        del state["last.weight"]
    else:
        state["last.weight"] = state["last.weight"].T
    layout, full = layout_of(), initial()

    def from_elsewhere(client: str) -> ClientApp:
        return answering(lambda _: statistics_record(measured(client, full, layout), layout))

    grid = in_process_grid({client: from_elsewhere(client) for client in CLIENTS})
    assert "'last.weight'" in error_of(ContributionError, grid, ArrayRecord(state))


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), float("inf")])
def test_alpha_outside_of_zero_to_one_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        RegMean(alpha=alpha)


def test_an_unknown_weighting_is_refused_and_not_taken_for_uniform() -> None:
    with pytest.raises(ValueError, match="weighting"):
        RegMean(weighting="example")  # type: ignore[arg-type]


def test_the_flower_app_of_the_readme_runs(in_process_grid: Any) -> None:
    page = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    trained: list[list[str]] = []

    def fine_tune(base: Net, data: list[str]) -> Net:
        trained.append(data)
        return tune(net(ArrayRecord(base.state_dict())), seed=7)

    batch = {"x": torch.randn(4, 6)}
    names: dict[str, Any] = {
        "base": Net(),
        "batch": batch,
        "batches": [batch],
        "data": ["a", "b"],
        "fine_tune": fine_tune,
    }
    exec(snippet, names)
    names["server"](in_process_grid({"a": names["client"], "b": names["client"]}), None)
    assert trained == [["a", "b"], ["a", "b"]]

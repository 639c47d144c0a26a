"""A stranger who has whoever loads a model run code: by a repository that brings its own, a pickle, a kernel.

It hopes for a question that somebody answers with yes, or for none. It gets a ModelError, or the library's own class.
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from gramfuse_cli.main import cli
from gramfuse_client.measuring.checkpoint import task_of_model
from gramfuse_model.loading.base_model import kept_parameters, load_base, own_head
from gramfuse_model.loading.zero_head import plan_for
from gramfuse_protocol.contract.layout import Group, Layout, Linear, Tensor
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import ModelError
from gramfuse_protocol.statistics.about import Origin
from gramfuse_protocol.statistics.contribution import Statistics
from gramfuse_protocol.statistics.file import write_statistics
from gramfuse_server.merging.files import Settings, merge_files

ROOT = Path(__file__).parents[2]
TASK = Task(task="classification", labels=("no", "yes"))
CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
Path("MARK").touch()
from transformers import BertConfig as Config, BertForSequenceClassification as Model, PreTrainedTokenizerFast as Tokens
def generate(model, **kwargs):
    raise SystemExit("ran")
"""


@pytest.fixture
def hostile(tmp_path: Path, pico_bert: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a model with code beside it; whatever asks a question fails, and so does a run of the code."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    copy = shutil.copytree(pico_bert, tmp_path / "hostile")
    for path in (copy / "evil.py", copy / "custom_generate" / "generate.py"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(CODE.replace("MARK", str(tmp_path / "ran")), encoding="utf-8")
    return copy


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def pins(directory: Path) -> Any:
    return load_base(plan_for("x", str(directory), TASK), Path()).pins


class Pickled:
    """Runs a command when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


MAP = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForSequenceClassification": "evil.Model"}
KERNELS = {"attn_implementation": "someone/evil", "_attn_implementation": "someone/evil"}


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"auto_map": MAP}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokens", "evil.Tokens"]}}),
        ("tokenizer_config.json", {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Tokens", None]}}),
        ("config.json", KERNELS | {"experts_implementation": "someone/evil"}),
        ("generation_config.json", {"custom_generate": "evil"}),
        ("tokenizer_config.json", {"chat_template": "{{ cycler.__init__.__globals__.os.system('false') }}"}),
    ],
)
def test_code_beside_a_model_that_transformers_knows_is_not_run(
    hostile: Path, tmp_path: Path, pico_bert: Path, file: str, change: dict[str, Any]
) -> None:
    edit(hostile / file, lambda document: document.update(change))
    plan = plan_for("x", str(hostile), TASK)
    assert pins(hostile) == pins(pico_bert)
    own_head(plan, Path(), "x")
    kept_parameters(plan.override(['model.head="own"']), Path())
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"model_type": "evil", "auto_map": MAP}),
        ("config.json", {"model_type": None, "auto_map": MAP}),
        ("config.json", {"text_config": {"model_type": "evil", "auto_map": MAP}}),
        ("config.json", {"parts": [{"auto_map": MAP}]}),
        ("config.json", {"transformers_weights": "adapter_model.bin"}),
        ("config.json", {"quantization_config": {"quant_method": "evil"}}),
        ("adapter_config.json", {"base_model_name_or_path": "someone/evil"}),
        ("shard-00001-model-00001-of-00001.safetensors", {}),
    ],
)
def test_a_model_that_needs_code_or_leads_elsewhere_is_refused(
    hostile: Path, tmp_path: Path, file: str, change: dict[str, Any]
) -> None:
    edit(hostile / file, lambda document: document.update(change))
    with pytest.raises(ModelError):
        load_base(plan_for("x", str(hostile), TASK), Path())
    with pytest.raises(ModelError):
        task_of_model(str(hostile), Path())
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "tf_model.h5"])
def test_weights_in_a_file_that_can_hold_code_are_not_opened(hostile: Path, tmp_path: Path, name: str) -> None:
    (hostile / "model.safetensors").unlink()
    mark = tmp_path / "ran"
    torch.save({"weight": Pickled(mark)}, hostile / name)
    with pytest.raises(ModelError) as caught:
        load_base(plan_for("x", str(hostile), TASK), Path())
    assert repr(name) in str(caught.value)
    assert "save_pretrained" in str(caught.value)
    # Neither does a list of parts lead there, in this directory or another.
    for part in (name, f"../hostile/{name}", "../model.safetensors", 7):
        (hostile / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"w": part}}))
        with pytest.raises(ModelError):
            load_base(plan_for("x", str(hostile), TASK), Path())
    assert not mark.exists()
    with (hostile / "it works").open("wb") as file:
        pickle.dump(Pickled(mark), file)
    pickle.loads((hostile / "it works").read_bytes())
    assert mark.exists()


@pytest.mark.parametrize("content", ["", "[]", "[" * 100_000, "\ud800".encode("utf-8", "surrogatepass"), '{"a": 1' * 9])
def test_a_configuration_that_is_none_is_refused(hostile: Path, content: str | bytes) -> None:
    (hostile / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError):
        load_base(plan_for("x", str(hostile), TASK), Path())


LAYOUT = Layout(
    groups=(Group(name="a", d_in=1, structure="full", weights=(Linear(weight="a.weight", d_out=1, transposed=True),)),),
    tensors=(Tensor(name="a.weight", shape=(1, 1), merge="regmean"),),
    frozen=(),
)


@pytest.mark.parametrize("name", ["HOSTILE", "someone/evil", "bundled:minilm", "./hostile", "[/x] someone"])
@pytest.mark.parametrize("command", ["merge", "tune"])
def test_a_file_from_a_stranger_does_not_say_what_is_loaded(
    hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, command: str
) -> None:
    """It names a model of the stranger's, and waits for `gramfuse merge` to load that."""
    for loader in (
        "gramfuse_server.merging.collection.load_base",
        "gramfuse_server.merging.collection.load_zero_headed",
        "gramfuse_server.merging.collection.load_with_adapter",
    ):
        monkeypatch.setattr(loader, lambda *_, **__: pytest.fail("the stranger's model was loaded"))
    monkeypatch.chdir(tmp_path)
    blocks = {block.name: torch.ones(block.shape).numpy() for block in LAYOUT.blocks}
    name = name.replace("HOSTILE", str(hostile))
    base = Origin(name=name, weights={"a.weight": "0" * 64}, config="1" * 64, processor="2" * 64)
    write_statistics(
        tmp_path / "s.safetensors", Statistics(1, {"a": 1}, blocks), name="north", base=base, task=TASK, layout=LAYOUT
    )
    with pytest.raises(ModelError) as caught:
        merge_files([tmp_path / "s.safetensors"], tmp_path / "out", Settings(), tmp_path)
    assert repr(name) in str(caught.value)
    assert "--base" in str(caught.value)
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a", "label": "no"}\n' * 4, encoding="utf-8")
    measured = ["--validation", str(data), "--test", str(data)] if command == "tune" else []
    done = CliRunner().invoke(cli, [command, "s.safetensors", "-o", "out", *measured])
    assert isinstance(done.exception, ModelError)
    assert not (tmp_path / "out").exists()


SOURCES = [
    path
    for package in (
        "cli",
        "client",
        "deployment",
        "model",
        "protocol",
        "server",
        "simulation",
        "benchmarks",
        "examples",
        "docs",
        "docker",
    )
    for path in sorted((ROOT / package).rglob("*.py"))
]
OPENERS = {"torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "pandas.read_pickle"}
NO_WEIGHTS = ("AutoConfig", "AutoTokenizer", "AutoImageProcessor", "getattr(transformers, form.processor)")


def test_every_call_that_loads_says_that_no_code_is_run_and_no_pickle_opened() -> None:
    seen = 0
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "joblib", "dill", "cloudpickle"}, f"{path}:{node.lineno}"
            if not isinstance(node, ast.Call):
                continue
            where = f"{path}:{node.lineno}"
            called, given = ast.unparse(node.func), {key.arg: ast.unparse(key.value) for key in node.keywords}
            assert called not in OPENERS, where
            assert given.get("allow_pickle", "False") == "False", where
            assert given.get("trust_remote_code", "False") == "False", where
            receiver, _, method = called.rpartition(".")
            if method not in ("from_pretrained", "from_config"):
                continue
            seen += 1
            assert given.get("trust_remote_code") == "False", where
            if method == "from_pretrained" and receiver not in NO_WEIGHTS:
                assert given.get("use_safetensors") == "True", where
    assert seen >= 7, "this test looks for calls in the wrong places"


def test_data_sets_bring_no_code_either() -> None:
    """Since its version 4, the datasets library runs no script of a repository, and has no setting to do so."""
    assert '"datasets>=4' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")

"""The statistics file: what is written is read, safetensors reads it too, and nothing that was changed is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from gramfuse_protocol.contract.layout import Group, Layout, Linear, Tensor
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import ContributionError, RunDirectoryError
from gramfuse_protocol.statistics.about import AddedTokens, Origin
from gramfuse_protocol.statistics.contribution import Statistics
from gramfuse_protocol.statistics.file import read_statistics, write_statistics

LAYOUT = Layout(
    groups=(
        Group(name="a", d_in=3, structure="full", weights=(Linear(weight="a.weight", d_out=2, transposed=True),)),
        Group(name="ä", d_in=4, structure="block:2", weights=(Linear(weight="ä.weight", d_out=1, transposed=False),)),
    ),
    tensors=(
        Tensor(name="a.weight", shape=(2, 3), merge="regmean"),
        Tensor(name="ä.weight", shape=(4, 1), merge="regmean"),
        Tensor(name="a.bias", shape=(2,), merge="mean"),
    ),
    frozen=("e",),
)
TASK = Task(task="classification", labels=('yes, "sir"', "nein\\n 漢字"), threshold=0.25)
OWN = {"head.weight": np.array([[1.5, -2.0]], np.float32)}
ADDED = AddedTokens(('<a "b\\">', "\n", "漢🐈"), {"e": np.arange(6, dtype=np.float32).reshape(3, 2)})


def statistics(seed: int = 1) -> Statistics:
    rng = np.random.default_rng(seed)
    blocks = {block.name: rng.normal(size=block.shape).astype(np.float32) for block in LAYOUT.blocks}
    return Statistics(7, {"a": 40, "ä": 0}, blocks)


def write(path: Path, measured: Statistics | None = None, **changes: Any) -> Path:
    about: dict[str, Any] = {
        "name": "north",
        "base": Origin(name="some/base", weights={"a.weight": "0" * 64}, config="1" * 64, processor="2" * 64),
        "task": TASK,
        "layout": LAYOUT,
        "head": ["head.weight"],
        "own": OWN,
        "added": ADDED,
    }
    write_statistics(path, measured or statistics(), **{**about, **changes})
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a whole file."""
    return write(tmp_path_factory.mktemp("good") / "north.safetensors").read_bytes()


@given(seed=st.integers(0, 2**32 - 1), examples=st.integers(1, 2**53 - 1))
@settings(max_examples=25, deadline=None)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, seed: int, examples: int) -> None:
    measured = Statistics(examples, {"a": 40, "ä": 0}, statistics(seed).blocks)
    path = write(tmp_path_factory.mktemp("file") / "north.safetensors", measured)
    file = read_statistics(path)
    assert (file.name, file.examples, dict(file.tokens)) == ("north", examples, {"a": 40, "ä": 0})
    assert file.about.layout.digest == LAYOUT.digest
    assert file.about.task == TASK
    for block in LAYOUT.blocks:
        assert file.block(block.name).tobytes() == measured.block(block.name).tobytes()
        assert file.block(block.name).shape == block.shape
    assert file.own()["head.weight"].tobytes() == OWN["head.weight"].tobytes()
    rows = file.rows("e")
    assert file.added == ADDED.tokens
    assert rows is not None
    assert np.array_equal(rows, ADDED.rows["e"])
    assert file.rows("a.bias") is None
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_it_is_a_safetensors_file_as_the_format_document_says(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "north.safetensors"
    path.write_bytes(good)
    with safe_open(path, "numpy") as file:
        assert set(file.keys()) == {*(block.name for block in LAYOUT.blocks), "own:head.weight", "added:e"}
        assert file.metadata().keys() == {"gramfuse", "sha256"}
        assert np.array_equal(file.get_tensor("delta:ä.weight"), statistics().block("delta:ä.weight"))
        metadata = file.metadata()
    # The digest, as anybody would compute it from the document alone.
    length = int.from_bytes(good[:8], "little")
    digest = hashlib.sha256(metadata["gramfuse"].encode() + good[8 + length :]).hexdigest()
    assert metadata["sha256"] == digest == read_statistics(path).sha256
    assert json.loads(metadata["gramfuse"])["version"] == 1
    assert length % 8 == 0
    with pytest.raises(RunDirectoryError, match=r"north\.safetensors exists"):
        write(path)


@given(change=st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_changed_file_is_read(tmp_path: Path, good: bytes, change: st.DataObject) -> None:
    changed = bytearray(good)
    match change.draw(st.sampled_from(["flip", "cut", "append", "insert", "remove", "swap", "zero"])):
        case "flip":
            for place in change.draw(st.lists(st.integers(0, len(good) - 1), min_size=1, max_size=4, unique=True)):
                changed[place] ^= change.draw(st.integers(1, 255))
        case "cut":
            del changed[change.draw(st.integers(0, len(good) - 1)) :]
        case "append":
            changed += change.draw(st.binary(min_size=1, max_size=9))
        case "insert":
            changed.insert(change.draw(st.integers(0, len(good))), change.draw(st.integers(0, 255)))
        case "remove":
            del changed[change.draw(st.integers(0, len(good) - 1))]
        case "swap":
            first, second = (change.draw(st.integers(0, len(good) // 4 - 1)) * 4 for _ in range(2))
            changed[first : first + 4], changed[second : second + 4] = (
                good[second : second + 4],
                good[first : first + 4],
            )
        case "zero":
            first = change.draw(st.integers(0, len(good) - 1))
            changed[first:] = bytes(len(good) - first)
    path = tmp_path / "north.safetensors"
    path.write_bytes(changed)
    if bytes(changed) == good:
        read_statistics(path)
        return
    with pytest.raises(ContributionError, match=r"north\.safetensors"):
        read_statistics(path)


def rewritten(
    good: bytes, change: Callable[[dict[str, Any], dict[str, Any]], None], data: bytes | None = None
) -> bytes:
    """Somebody edits header and document and puts the right digest in."""
    length = int.from_bytes(good[:8], "little")
    header, data = json.loads(good[8 : 8 + length]), good[8 + length :] if data is None else data
    document = json.loads(header["__metadata__"]["gramfuse"])
    change(header, document)
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    header["__metadata__"] = {"gramfuse": text, "sha256": hashlib.sha256(text.encode() + data).hexdigest()}
    written = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    written += b" " * (-len(written) % 8)
    return len(written).to_bytes(8, "little") + written + data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header, document: header.pop("delta:a.bias"), "tensor 'delta:a.bias' is missing"),
        (lambda header, document: header["gram:a"].update(dtype="F16"), r"tensor 'gram:a' is .*F16.*F32"),
        (lambda header, document: header["gram:a"].update(shape=[3, 2]), r"tensor 'gram:a' is .*\[3, 2\].*\[6\]"),
        (lambda header, document: header["gram:a"].update(data_offsets=[0, 8]), "tensor 'gram:a' is"),
        (lambda header, document: header.update(more=header["gram:a"]), "tensor 'more' is .* expects no such"),
        (
            lambda header, document: header.update({"gram:a": header.pop("gram:a")}),
            "header",
        ),
        (
            lambda header, document: document.update(version=2),
            "version 2.*version 1",
        ),
        (
            lambda header, document: document.update(examples=0),
            "'examples'",
        ),
        (lambda header, document: document.update(examples="7"), "'examples'"),
        (lambda header, document: document.update(name="../x"), "'name': String should match"),
        (lambda header, document: document.update(more=1), "unknown key 'more'"),
        (lambda header, document: document["tokens"].pop("a"), "token counts"),
        (lambda header, document: document["layout"]["groups"].pop(), "'layout': .* do not match"),
        (lambda header, document: document["layout"]["tensors"].pop(), "tensor 'delta:a.bias' is .* expects no such"),
        (lambda header, document: document["task"].update(labels=["one"]), "'task': .*two labels"),
        (lambda header, document: document["base"].update(weights={}), "'base.weights'"),
        (lambda header, document: document.update(added=None), "tensor 'added:e' is .* expects no such"),
        (lambda header, document: document["added"]["tokens"].pop(), "'added': .*'e' "),
        (lambda header, document: document["added"]["tokens"].__setitem__(0, "\\n"), "'added': .* occurs twice"),
        (lambda header, document: document["added"]["tokens"].__setitem__(0, "漢"), "'added.tokens.0': .*not a token"),
        (
            lambda header, document: document["added"]["tokens"].__setitem__(0, "\\ud800"),
            "'added.tokens.0': .*not a token",
        ),
        (lambda header, document: document["added"]["tokens"].__setitem__(0, 'a", "b'), "'added.tokens.0'"),
        (lambda header, document: document["added"]["tokens"].__setitem__(0, ""), "'added.tokens.0': .*not a token"),
    ],
)
def test_a_file_with_a_right_digest_and_wrong_content_is_refused(
    tmp_path: Path, good: bytes, change: Callable[[dict[str, Any], dict[str, Any]], None], message: str
) -> None:
    path = tmp_path / "north.safetensors"
    path.write_bytes(rewritten(good, lambda header, document: None))
    read_statistics(path)  # the edit itself is what is refused, not how this test writes it
    path.write_bytes(rewritten(good, change))
    with pytest.raises(ContributionError, match=message):
        read_statistics(path)


def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "north.safetensors"
    data = bytearray(good[8 + int.from_bytes(good[:8], "little") :])
    data[24:28] = np.float32(np.nan).tobytes()  # delta:a.bias comes after added:e
    path.write_bytes(rewritten(good, lambda header, document: None, bytes(data)))
    with pytest.raises(ContributionError, match=r"tensor 'delta:a.bias' .*NaN"):
        read_statistics(path)
    blocks = dict(statistics().blocks)
    blocks["gram:a"] = np.full(6, np.inf, np.float32)
    with pytest.raises(ContributionError, match="tensor 'gram:a' has 6 NaN"):
        write(tmp_path / "other.safetensors", Statistics(7, {"a": 40, "ä": 0}, blocks))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        bytes(8),
        b"\xff" * 100,
        (2**40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{}",
        (200000).to_bytes(8, "little") + b"[" * 200000,
        (32).to_bytes(8, "little") + b'{"__metadata__":{"gramfuse":1}} ',
    ],
    ids=["empty", "short", "zeros", "ones", "huge header", "list", "no metadata", "deep", "no text"],
)
def test_what_is_no_statistics_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "north.safetensors"
    path.write_bytes(content)
    with pytest.raises(ContributionError, match=r"north\.safetensors: is not a statistics file"):
        read_statistics(path)
    with pytest.raises(ContributionError, match="cannot be read: No such file"):
        read_statistics(tmp_path / "nowhere")

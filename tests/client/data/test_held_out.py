"""Held-out examples: a split by seed, and the digest of all data."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gramfuse_client.data.examples import Examples, load
from gramfuse_protocol.errors import DataError
from tests.client.data.reading import CLASSIFY, EXAMPLES, LABELS, as_gzip, silo


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(2, 60),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_split_by_seed_is_disjoint_complete_and_deterministic(
    count: int, fraction: float, seed: int, tmp_path: Path
) -> None:
    texts = [f"text {n}" for n in range(count)]
    source = as_gzip(tmp_path, [{"text": text, "label": LABELS[n % 3]} for n, text in enumerate(texts)])
    if max(1, round(fraction * count)) >= count:
        with pytest.raises(DataError, match=r"silo\.toml: data\.held-out"):
            load(silo(tmp_path, source, fraction, split_seed=seed), CLASSIFY)
        return
    train, held_out = load(silo(tmp_path, source, fraction, split_seed=seed), CLASSIFY)
    assert sorted([*train.inputs, *held_out.inputs]) == sorted(texts)
    assert abs(len(held_out) - fraction * count) <= 1
    assert len(held_out) >= 1
    for examples in (train, held_out):
        assert examples.labels == [int(text.split()[1]) % 3 for text in examples.inputs]
    assert load(silo(tmp_path, source, fraction, split_seed=seed), CLASSIFY) == (train, held_out)


def test_another_split_seed_sets_other_examples_aside(tmp_path: Path) -> None:
    source = as_gzip(tmp_path, [{"text": f"text {n}", "label": LABELS[n % 3]} for n in range(50)])
    aside = {tuple(load(silo(tmp_path, source, 0.4, split_seed=seed), CLASSIFY)[1].inputs) for seed in range(4)}
    assert len(aside) == 4


def test_the_digest_tells_every_kind_of_change() -> None:
    variants = [
        EXAMPLES,
        Examples([*EXAMPLES.inputs[:-1], "other"], None, EXAMPLES.labels),
        Examples(EXAMPLES.inputs, None, [*EXAMPLES.labels[:-1], 0]),
        Examples(EXAMPLES.inputs, EXAMPLES.inputs, EXAMPLES.labels),
        EXAMPLES.take([1, 0, 2, 3, 4]),
        EXAMPLES.take([0, 1, 2, 3]),
    ]
    assert len({variant.digest for variant in variants}) == len(variants)

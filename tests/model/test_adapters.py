"""The frozen matrices of adapters, by an implementation of their own, and as vectors."""

from __future__ import annotations

import hashlib
import math
import struct

import numpy as np
import pytest
import torch

from gramfuse_model.adapters.frozen_matrix import derive_frozen, frozen_digest

VECTOR = "66a3d5d70a842c6499c30c49cf059194a81606d89ed33c0e0d95f2c8fa060ff6"


def numbers(seed: int, module: str, count: int) -> list[float]:
    stream = hashlib.shake_256(f"{seed} {module}".encode()).digest(8 * count)
    return [(word >> 11) / 2**53 for word in struct.unpack(f"<{count}Q", stream)]


def to_bfloat16(value: float) -> float:
    """The nearest bfloat16, ties to even, by way of float32."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    bits += 0x7FFF + ((bits >> 16) & 1)
    (rounded,) = struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))
    return float(rounded)


@pytest.mark.parametrize(("rank", "features"), [(4, 16), (3, 5), (1, 1)])
def test_a_matrix_follows_from_the_seed_and_the_name_of_its_module(rank: int, features: int) -> None:
    found = derive_frozen(7, "encoder.q", rank, features, "kaiming")
    drawn = numbers(7, "encoder.q", rank * features)
    expected = [to_bfloat16((2 * u - 1) / math.sqrt(features)) for u in drawn]
    assert found.dtype == torch.float32
    assert found.flatten().tolist() == expected
    normal = derive_frozen(7, "encoder.q", rank, features, "gaussian")
    half = -(-rank * features // 2)
    drawn = numbers(7, "encoder.q", 2 * half)
    radii = [math.sqrt(-2 * math.log(1 - u)) for u in drawn[:half]]
    turns = [2 * math.pi * u for u in drawn[half:]]
    both = [r * math.cos(a) for r, a in zip(radii, turns, strict=True)]
    both += [r * math.sin(a) for r, a in zip(radii, turns, strict=True)]
    assert normal.flatten().tolist() == [to_bfloat16(value / rank) for value in both[: rank * features]]


def test_orthogonal_rows_are_orthogonal_and_as_long_as_those_of_the_default() -> None:
    rows = derive_frozen(7, "encoder.q", 8, 64, "orthogonal").double().numpy()
    assert np.abs(rows @ rows.T - np.eye(8) / 3).max() < 3e-3  # entries are rounded to bfloat16


def test_the_digest_of_all_matrices_is_the_vector() -> None:
    matrices = {name: derive_frozen(1, name, 2, 4, "kaiming") for name in ("b.q", "a.v")}
    hasher = hashlib.sha256()
    for name in ("a.v", "b.q"):
        values = [to_bfloat16((2 * u - 1) / 2) for u in numbers(1, name, 8)]
        hasher.update(f"{name} 2,4\n".encode() + struct.pack("<8f", *values))
    assert frozen_digest(matrices) == hasher.hexdigest() == frozen_digest(dict(reversed(matrices.items())))
    assert frozen_digest(matrices) == VECTOR

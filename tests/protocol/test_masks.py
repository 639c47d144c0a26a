"""Masks against AES-256 applied to counters one by one, and against the vectors of NIST."""

from __future__ import annotations

import itertools
import os
import random

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from gramfuse_protocol.secure_sum.masks import WORDS, Mask, apply

KEYS = [random.Random(n).randbytes(32) for n in range(4)]


def slow(key: bytes, start: int, count: int) -> list[int]:
    """Words [start, start + count) of a stream: the block cipher alone, one big-endian counter after the other."""
    first = start // 2
    blocks = -(-(start + count) // 2) - first
    counters = b"".join((first + n).to_bytes(16, "big") for n in range(blocks))
    stream = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(counters)
    return [int.from_bytes(stream[8 * n : 8 * n + 8], "little") for n in range(count)]


def words_of(count: int, seed: int = 5) -> np.ndarray:
    return np.frombuffer(random.Random(seed).randbytes(8 * count), np.uint64).copy()


def test_the_stream_is_that_of_nist_sp_800_38a() -> None:
    # F.5.5, CTR-AES256.Encrypt: output blocks 1 to 4.
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = int.from_bytes(bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"), "big")
    target = np.zeros(8, np.uint64)
    apply(target, [Mask(key, 1)], 2 * counter)
    assert target.astype("<u8").tobytes().hex() == (
        "0bdf7df1591716335e9a8b15c860c502"
        "5a6e699d536119065433863c8f657b94"
        "1bc12c9c01610d5d0d8bd6a3378eca62"
        "2956e1c8693536b1bee99c73a31576b6"
    )


@pytest.mark.parametrize("start", [0, 2, 6, WORDS - 2, WORDS, 2**33, 2**64 + 4])
@pytest.mark.parametrize("count", [1, 2, 7, 1001])
def test_a_mask_is_aes_256_of_the_counters_from_any_even_word_on(start: int, count: int) -> None:
    masks = [Mask(KEYS[0], 1), Mask(KEYS[1], -1), Mask(KEYS[2], 1)]
    target = words_of(count)
    streams = [slow(mask.key, start, count) for mask in masks]
    expected = [
        (int(word) + sum(mask.sign * stream[n] for mask, stream in zip(masks, streams, strict=True))) % 2**64
        for n, word in enumerate(target)
    ]
    apply(target, masks, start)
    assert target.tolist() == expected


@pytest.mark.parametrize("cores", [1, 2, 3, 64, None])
def test_any_number_of_cores_gives_the_same_words(cores: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    count = 3 * WORDS + 5  # several threads, and within one several turns
    target = np.zeros(count, np.uint64)
    apply(target, [Mask(KEYS[0], 1)], 4)
    for first in (0, WORDS - 3, 2 * WORDS - 2, 3 * WORDS - 3):
        first += first % 2
        assert target[first : first + 7].tolist() == slow(KEYS[0], 4 + first, min(7, count - first)), first
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    alone = np.zeros(count, np.uint64)
    apply(alone, [Mask(KEYS[0], 1)], 4)
    np.testing.assert_array_equal(target, alone)


def test_pieces_entered_at_even_words_are_the_whole() -> None:
    masks = [Mask(KEYS[0], 1), Mask(KEYS[3], -1)]
    whole = words_of(WORDS + 901)
    pieces = whole.copy()
    apply(whole, masks)
    cuts = [0, 2, 400, 402, WORDS, WORDS + 900, WORDS + 901]
    for start, stop in itertools.pairwise(cuts):
        apply(pieces[start:stop], masks, start)
    np.testing.assert_array_equal(pieces, whole)


def test_a_mask_and_its_inverse_cancel_whatever_lies_between_them() -> None:
    plain = words_of(2000)
    target = plain.copy()
    masks = [Mask(key, 1 if n % 2 else -1) for n, key in enumerate(KEYS)]
    apply(target, masks)
    assert not np.any(target == plain)
    target += np.uint64(3)
    apply(target, [mask.inverse for mask in reversed(masks)])
    np.testing.assert_array_equal(target, plain + np.uint64(3))
    assert [mask.inverse.inverse for mask in masks] == masks
    apply(target, [])
    apply(target[:0], masks)
    np.testing.assert_array_equal(target, plain + np.uint64(3))


@pytest.mark.parametrize("start", [1, 3, 2**20 + 1])
def test_an_odd_word_is_no_place_to_enter_and_nothing_is_masked(start: int) -> None:
    target = words_of(10)
    before = target.copy()
    with pytest.raises(ValueError, match=f"start is {start}; .*even words"):
        apply(target, [Mask(KEYS[0], 1)], start)
    np.testing.assert_array_equal(target, before)


def test_no_text_form_of_a_mask_shows_its_key() -> None:
    mask = Mask(KEYS[0], -1)
    for text in (repr(mask), str(mask), f"{mask}", repr([mask]), f"{(mask, mask.inverse)!r}"):
        assert text.count("Mask(sign=") == len(text.split("Mask(")) - 1
        assert KEYS[0].hex() not in text
        assert repr(KEYS[0]) not in text

"""Masks: key streams of 64-bit words, generated and added to a vector modulo 2^64 in small parts.

A mask is AES-256 in counter mode (NIST SP 800-38A) over zeros, the counter starting at zero: byte k of the stream is
byte k mod 16 of the encryption of the 16-byte big-endian number k div 16. Every eight bytes are a little-endian word.
No nonce is needed, because every key is used for one stream only (`gramfuse_protocol.secure_sum.member`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

Words = NDArray[np.uint64]

WORDS = 2**17
"""Number of words generated at a time: 1 MiB, which stays in the CPU cache."""

_AES_BLOCK = 16
_ZEROS = bytes(8 * WORDS)


class Mask(NamedTuple):
    """The key of a stream, and whether the stream is added or subtracted; the repr does not show the key."""

    key: bytes
    sign: Literal[1, -1]

    def __repr__(self) -> str:
        return f"Mask(sign={self.sign})"

    @property
    def inverse(self) -> Mask:
        """The mask that cancels this one."""
        return Mask(self.key, -1 if self.sign == 1 else 1)


def apply(target: Words, masks: Sequence[Mask], start: int = 0) -> None:
    """Add streams to a vector in place, modulo 2^64, on all cores.

    Args:
        target: uint64 (words,), contiguous.
        masks: with keys of 32 bytes; no key may occur twice with the same sign.
        start: position of the first word of `target` in the streams; must be even.

    Raises:
        ValueError: if `start` is odd.
    """
    if start % 2:
        raise ValueError(f"start is {start}; a stream can be entered at even words only")
    if not masks or not target.size:
        return
    workers = min(os.cpu_count() or 1, -(-target.size // WORDS)) or 1
    size = -(-target.size // workers // WORDS) * WORDS
    parts = [(target[at : at + size], start + at) for at in range(0, target.size, size)]
    if len(parts) == 1:
        _apply(*parts[0], masks)
        return
    with ThreadPoolExecutor(workers) as pool:  # OpenSSL and NumPy release the GIL
        for future in [pool.submit(_apply, part, at, masks) for part, at in parts]:
            future.result()


def _apply(target: Words, start: int, masks: Sequence[Mask]) -> None:
    counter = (start // 2).to_bytes(_AES_BLOCK, "big")
    streams = [(Cipher(algorithms.AES(mask.key), modes.CTR(counter)).encryptor(), mask.sign) for mask in masks]
    buffer = bytearray(8 * WORDS + _AES_BLOCK - 1)  # update_into demands room for one more block
    stream = np.frombuffer(buffer, "<u8", count=WORDS)
    for at in range(0, target.size, WORDS):
        part = target[at : at + WORDS]
        zeros = memoryview(_ZEROS)[: part.nbytes]
        for cipher, sign in streams:
            cipher.update_into(zeros, buffer)
            words = stream[: part.size]
            if sign == 1:
                np.add(part, words, out=part)
            else:
                np.subtract(part, words, out=part)

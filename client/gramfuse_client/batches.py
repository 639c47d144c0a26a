"""Examples as batches of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from gramfuse_client.data import Examples

Batch = dict[str, torch.Tensor]


class Encoded(Dataset[dict[str, Any]]):
    """Tokenised examples, unpadded, as the transformers Trainer takes them."""

    def __init__(self, examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        encoded = tokenizer(
            list(examples.texts),
            None if examples.pairs is None else list(examples.pairs),
            truncation=True,
            max_length=max_length,
        )
        self.rows = [
            {**{key: encoded[key][i] for key in encoded}, "labels": label} for i, label in enumerate(examples.labels)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def batches(
    encoded: Encoded,
    tokenizer: PreTrainedTokenizerBase,
    size: int,
    device: torch.device,
    *,
    by_length: bool = False,
) -> Iterator[Batch]:
    """Yield padded batches, `labels` included.

    Args:
        by_length: sort by length, which saves padding; otherwise in the order of the examples.
    """
    ordered = sorted(encoded.rows, key=lambda row: len(row["input_ids"])) if by_length else encoded.rows
    for start in range(0, len(ordered), size):
        rows = ordered[start : start + size]
        labels = torch.tensor([row["labels"] for row in rows])
        inputs = tokenizer.pad([{k: v for k, v in row.items() if k != "labels"} for row in rows], return_tensors="pt")
        yield {**{key: value.to(device) for key, value in inputs.items()}, "labels": labels.to(device)}

"""Several models asked together, against a plain loop."""

from __future__ import annotations

import torch

from gramfuse_client.training.ensemble import combine, most_voted
from gramfuse_client.training.outputs import Outputs

LOGITS = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))  # (models, batch, labels)


def test_logits_are_averaged_over_the_models_that_have_the_label() -> None:
    annotated = [(0, 1, 2), (1, 2, 3), (2,)]
    found = combine([Outputs(logits) for logits in LOGITS], annotated).logits
    for example in range(4):
        for label in range(5):
            own = [float(LOGITS[m, example, label]) for m in range(3) if label in annotated[m]]
            mean = sum(own) / len(own) if own else 0.0
            torch.testing.assert_close(float(found[example, label]), mean, rtol=1e-6, atol=1e-7)


def test_outputs_that_are_no_labels_are_averaged_over_all_models_at_every_position() -> None:
    found = combine([Outputs(logits.unsqueeze(0)) for logits in LOGITS], [()] * 3).logits
    torch.testing.assert_close(found[0], (LOGITS[0] + LOGITS[1] + LOGITS[2]) / 3)


def test_texts_are_voted_on_one_by_one_and_a_tie_goes_to_the_first_model() -> None:
    said = [("yes", "a"), ("no", "b"), ("no", "c")]
    found = combine([Outputs(logits, texts) for logits, texts in zip(LOGITS, said, strict=True)], [()] * 3)
    assert found.texts == ("no", "a")
    assert most_voted(["b", "a", "a", "b"]) == "b"

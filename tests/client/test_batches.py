"""Examples as tensors: which token has a label, what padding looks like, what a masked label costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from seqeval.metrics import f1_score
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import CanineConfig, CanineModel, CanineTokenizer, PreTrainedTokenizerFast

from gramfuse_client.data.batches import Encoded, batches
from gramfuse_client.data.examples import Examples
from gramfuse_client.tasks.registry import at_silo
from gramfuse_client.training.evaluate import count, rows
from gramfuse_client.training.finetune import finetune
from gramfuse_client.training.outputs import Outputs
from gramfuse_model.loading.base_model import load_base
from gramfuse_model.probing.batch import IGNORED, inputs_of
from gramfuse_protocol.contract.plan import Plan
from gramfuse_protocol.contract.plan_sections import Training
from gramfuse_protocol.contract.task import MaskedTask, Task
from gramfuse_protocol.errors import DataError, ModelError
from gramfuse_protocol.held_out.metrics import metrics
from gramfuse_protocol.tasks.classification import confusion
from gramfuse_protocol.tasks.token_classification import ENTITIES

CPU = torch.device("cpu")
TAGS = ("O", "B-PER", "I-PER")
TAG = Task(task="token-classification", labels=TAGS, max_length=8)
WRITE = Task(task="sequence-to-sequence", max_length=8, target_length=4)
SPEAK = Task(task="causal-lm", max_length=8)
CORPUS = ["the cat sat on the mat", "Anna Maria met Tom in London", "London is big"]


def words_and_labels(encoded: Encoded) -> list[list[tuple[str, int]]]:
    """Return each example's tokens with their labels."""
    tokens = encoded.tokenizer.convert_ids_to_tokens
    return [list(zip(tokens(row["input_ids"]), row["labels"], strict=True)) for row in encoded.rows or ()]


def test_a_words_tag_is_at_its_first_token(pico_tokenizer: Any) -> None:
    examples = Examples([("cat", "big-dog", "cat"), ("cow",)], None, [(1, 2, 0), (1,)])
    found = words_and_labels(Encoded(examples, pico_tokenizer, TAG))
    assert found == [
        [
            ("[CLS]", IGNORED),
            ("cat", 1),
            ("big", 2),
            ("[UNK]", IGNORED),
            ("dog", IGNORED),
            ("cat", 0),
            ("[SEP]", IGNORED),
        ],
        [("[CLS]", IGNORED), ("cow", 1), ("[SEP]", IGNORED)],
    ]


def as_labelled(batch: dict[str, torch.Tensor]) -> Outputs:
    """What a model says that is right at every token that has a label."""
    return Outputs(torch.nn.functional.one_hot(batch["labels"].clamp(min=0), len(TAGS)).float())


def test_entities_beyond_the_maximum_are_missed(pico_tokenizer: Any) -> None:
    """Of twenty words six have room; the third entity is cut in two, and the others are not seen."""
    tags = (1, 2, 0, 1, 0, *(1, 2), *(1,) * 13)
    encoded = Encoded(Examples([("cat",) * 20, ("dog",)], None, [tags, (1,)]), pico_tokenizer, TAG)
    (batch,) = batches(encoded, 4, CPU)
    assert batch["labels"][0].tolist() == [IGNORED, *tags[:6], IGNORED]
    found, predicted, truth = 2 + 1, 3 + 1, 16 + 1
    assert count(batch, as_labelled(batch), TAG, pico_tokenizer).tolist() == [2, found, predicted, truth]


@pytest.mark.parametrize("nothing", ["\u200b", "\ufe0f", "\u200d\u2060"])
def test_a_word_without_tokens_is_predicted_as_none(nothing: str, pico_tokenizer: Any) -> None:
    cleaning = Tokenizer.from_str(pico_tokenizer.backend_tokenizer.to_str())
    cleaning.normalizer = normalizers.BertNormalizer()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=cleaning, pad_token="[PAD]")
    words = [("cat", nothing, "dog", "cow"), (nothing, "cat", nothing), ("hen", nothing)]
    tags = [(1, 2, 2, 0), (1, 2, 0), (1, 1)]
    encoded = Encoded(Examples(words, None, tags), tokenizer, TAG)
    assert [sum(label != IGNORED for _, label in row) for row in words_and_labels(encoded)] == [3, 1, 1]
    (batch,) = batches(encoded, 3, CPU)
    sums = count(batch, as_labelled(batch), TAG, tokenizer)
    # An entity of three words comes out as two of one, one of two as its second word, and one of two of one.
    predicted = [["B-PER", "O", "I-PER", "O"], ["O", "I-PER", "O"], ["B-PER", "O"]]
    truth = [[TAGS[tag] for tag in row] for row in tags]
    assert sums.tolist() == [3, 1, 4, 4]
    assert metrics(TAG, sums)["entity-f1"] == pytest.approx(f1_score(truth, predicted))
    assert rows(batch, as_labelled(batch), TAG, tokenizer)[:4].tolist() == [3, 1, 3, 3], "the same in a secure sum"


def test_an_example_of_which_most_is_cut_moves_a_secure_sum_no_further(pico_tokenizer: Any) -> None:
    examples = Examples([("cat",) * 500], None, [(1,) * 500])
    (batch,) = batches(Encoded(examples, pico_tokenizer, TAG), 1, CPU)
    total = rows(batch, as_labelled(batch), TAG, pico_tokenizer)
    assert np.linalg.norm(total[1:4]) == pytest.approx(ENTITIES, abs=1e-3)
    assert total[3] > total[1] > 0


def test_examples_that_teach_nothing_are_refused_before_training(pico_tokenizer: Any) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=pico_tokenizer.backend_tokenizer, pad_token="[PAD]")
    bare.backend_tokenizer.post_processor = None
    bare.backend_tokenizer.normalizer = normalizers.BertNormalizer()
    texts = Encoded(Examples(["cat dog", "cat"], None, [None, None]), bare, SPEAK)
    words = Encoded(Examples([("cat",), ("\u200b", "\ufe0f"), ("\u200b",)], None, [(1,), (1, 2), (0,)]), bare, TAG)
    for encoded, said in ((texts, "1 of 2 texts"), (words, "2 of 3 examples have no word")):
        with pytest.raises(DataError, match=said):
            finetune(None, encoded, Training(), CPU)  # type: ignore[arg-type]  # it does not come to the model


@pytest.mark.parametrize(
    ("task", "inputs"),
    [
        (Task(task="classification", labels=("a", "b")), ["cat", "cat dog"]),
        (Task(task="multi-label", labels=("a", "b")), ["cat", "cat dog"]),
        (Task(task="regression"), ["cat", "cat dog"]),
        (TAG, [("cat",), ("cat", "dog")]),
    ],
    ids=lambda value: getattr(value, "task", ""),
)
def test_examples_without_labels_are_inputs_all_the_same(task: Task, inputs: Any, pico_tokenizer: Any) -> None:
    (batch,) = batches(Encoded(Examples(inputs, None, [None, None]), pico_tokenizer, task), 2, CPU)
    labels = {"token-classification": [(0,), (0, 0)], "multi-label": [(), ()]}.get(task.task, [0, 0])
    (labelled,) = batches(Encoded(Examples(inputs, None, labels), pico_tokenizer, task), 2, CPU)
    assert "labels" not in batch
    assert batch.keys() == inputs_of(labelled).keys()
    for name, value in inputs_of(labelled).items():
        assert torch.equal(batch[name], value)


def test_an_order_is_drawn_by_the_seed(pico_tokenizer: Any) -> None:
    task = Task(task="regression")
    encoded = Encoded(Examples(["cat"] * 50, None, [float(n) for n in range(50)]), pico_tokenizer, task)

    def order(seed: int | None) -> list[float]:
        return torch.cat([batch["labels"] for batch in batches(encoded, 8, CPU, seed=seed)]).tolist()

    assert order(None) == list(range(50))
    assert order(3) == order(3) != order(4)
    assert sorted(order(3)) == list(range(50))
    # Uniform: over many seeds, the mean place of each example among the first ten is what chance gives (5 sigma).
    first = [example for seed in range(400) for example in order(seed)[:10]]
    counts = np.bincount(np.array(first, int), minlength=50)
    assert abs(counts - 80).max() < 5 * np.sqrt(80 * 0.8)


def train(pre_tokenizer: Any, normalizer: Any = None) -> Tokenizer:
    """A tokenizer of pieces of words."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizer, normalizer
    if "ByteLevel" in str(pre_tokenizer):
        tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    ends = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    tokenizer.post_processor = ends
    return tokenizer


SPLIT = pre_tokenizers.Split(
    Regex(r"'s|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), behavior="isolated"
)
"""As Llama 3 and Qwen have it."""

TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "split, then bytes": lambda: train(
        pre_tokenizers.Sequence([SPLIT, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    ),
    "bytes": lambda: train(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "bytes, with a space before": lambda: train(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "pieces of sentences": lambda: train(pre_tokenizers.Metaspace()),
    "pieces of sentences, no space before": lambda: train(pre_tokenizers.Metaspace(prepend_scheme="never")),
    "spaces by the normalizer": lambda: train(
        pre_tokenizers.Split("▁", "merged_with_next"),
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    ),
    "lower case": lambda: train(pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_words_of_their_own_are_the_tokens_that_they_are_in_a_text(kind: str) -> None:
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS[kind](), **names)
    words = ("Anna", "Maria's", "42", "cats", "met", "Tóm", "in", "1987,", "London", "!")
    task = Task(task="token-classification", labels=("O", "B-PER", "I-PER"), max_length=128)
    tags = tuple(n % 3 for n in range(len(words)))
    encoded = Encoded(Examples([words], None, [tags]), tokenizer, task)
    (row,) = encoded.rows or ()
    assert row["input_ids"] == tokenizer(" ".join(words))["input_ids"]
    labelled = [place for place, label in enumerate(row["labels"]) if label != IGNORED]
    assert [row["labels"][place] for place in labelled] == list(tags)
    # What lies between two labels, and nothing else, makes up a word.
    ends = [*labelled[1:], len(row["input_ids"]) - 1]
    found = [tokenizer.decode(row["input_ids"][start:stop]) for start, stop in zip(labelled, ends, strict=True)]
    folded = str.maketrans("óT", "ot") if kind == "lower case" else {}
    expected = [word.translate(folded).lower() if folded else word for word in words]
    assert [word.replace("▁", " ").replace(" ", "") for word in found] == expected


def test_a_tokenizer_without_places_is_refused_for_words(tmp_path: Path) -> None:
    torch.manual_seed(1)
    CanineModel(
        CanineConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, num_hash_buckets=8)
    ).save_pretrained(tmp_path)
    CanineTokenizer().save_pretrained(tmp_path)
    plan = Plan.parse(
        f'[plan]\nname = "x"\n[model]\nbase = "{tmp_path}"\ntask = "token-classification"\n'
        f'labels = ["O", "B-PER", "I-PER"]\n[privacy]\nsecure-aggregation = false\n[[silo]]\nname = "a"\n'
    )
    with pytest.raises(ModelError, match=r"CanineTokenizer.*tokenizer\.json"):
        load_base(plan, tmp_path)


def test_targets_are_padded_at_their_end_and_masked(pico_tokenizer: Any) -> None:
    # Three tokens on either side: [CLS] cat [SEP].
    texts, targets = ["cat", "dog", "cat dog cow"], ["dog", "cat the", "cow"]
    left = on_the_left(pico_tokenizer)
    for tokenizer in (pico_tokenizer, left):
        (batch,) = batches(Encoded(Examples(texts, None, targets), tokenizer, WRITE), 3, CPU)
        assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0]]
        assert torch.equal(batch["labels"] != IGNORED, batch["decoder_attention_mask"].bool())
        assert batch["attention_mask"].sum(dim=1).tolist() == [3, 3, 5]
    long = Encoded(Examples(["cat"], None, ["cat " * 9]), pico_tokenizer, WRITE)
    assert len(long[0]["labels"]) == WRITE.target_length


def on_the_left(tokenizer: Any) -> PreTrainedTokenizerFast:
    """The same tokenizer, which pads on the left."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]", padding_side="left")


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_is_padded_on_the_side_that_the_tokenizer_says_and_padding_is_nothing_to_predict(
    pico_tokenizer: Any, side: str
) -> None:
    tokenizer = on_the_left(pico_tokenizer) if side == "left" else pico_tokenizer
    examples = Examples(["cat", "cat dog cow"], None, [None, None])
    (batch,) = batches(Encoded(examples, tokenizer, SPEAK), 2, CPU)
    short = [0, 0, 1, 1, 1] if side == "left" else [1, 1, 1, 0, 0]
    assert batch["attention_mask"].tolist() == [short, [1] * 5]
    real = batch["attention_mask"].bool()
    assert batch["labels"][real].tolist() == [
        IGNORED, *batch["input_ids"][0][real[0]][1:].tolist(), IGNORED, *batch["input_ids"][1][1:].tolist()
    ]  # fmt: skip
    assert bool((batch["labels"][~real] == IGNORED).all())
    logits = torch.nn.functional.one_hot(batch["input_ids"].roll(-1, 1), len(pico_tokenizer)).float() * 50
    assert count(batch, Outputs(logits), SPEAK, tokenizer).round().tolist() == [2, 6, 0, 6]


def test_tags_stand_beside_their_words_where_a_tokenizer_pads_on_the_left(pico_tokenizer: Any) -> None:
    examples = Examples([("cat",), ("cow", "dog", "hen")], None, [(1,), (1, 2, 0)])
    (batch,) = batches(Encoded(examples, on_the_left(pico_tokenizer), TAG), 2, CPU)
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, IGNORED, 1, IGNORED], [IGNORED, 1, 2, 0, IGNORED]]


def test_batches_by_length_have_all_examples(pico_tokenizer: Any) -> None:
    task = Task(task="classification", labels=("a", "b"))
    texts = ["cat dog cow", "cat", "cat dog", "cat"]
    encoded = Encoded(Examples(texts, None, [0, 1, 0, 1]), pico_tokenizer, task)
    widths = [batch["input_ids"].shape[1] for batch in batches(encoded, 2, CPU, by_length=True)]
    assert widths == [3, 5]
    assert sum(batch["labels"].sum() for batch in batches(encoded, 3, CPU, by_length=True)) == 2


LOGITS = torch.tensor([[0.3, -1.0, 2.0], [1.5, 0.5, -0.5]])


def test_labels_that_a_silo_does_not_annotate_cost_nothing(pico_tokenizer: Any) -> None:
    task = MaskedTask(task="multi-label", labels=("a", "b", "c"), annotates=("c", "a"))
    loss = at_silo(task).loss(task)
    assert loss is not None
    logits = LOGITS.clone().requires_grad_()
    encoded = Encoded(Examples(["cat", "dog"], None, [(0,), (2,)]), pico_tokenizer, task)
    (labels,) = (batch["labels"] for batch in batches(encoded, 2, CPU))
    assert labels.isnan().tolist() == [[False, True, False]] * 2
    found = loss(SimpleNamespace(logits=logits), labels)
    p = 1 / (1 + np.exp(-LOGITS.double().numpy()))
    expected = -np.mean([np.log(p[0, 0]), np.log(1 - p[0, 2]), np.log(1 - p[1, 0]), np.log(p[1, 2])])
    assert float(found.detach()) == pytest.approx(expected, rel=1e-6)
    found.backward()
    assert logits.grad is not None
    assert not logits.grad[:, 1].any()
    assert logits.grad[:, [0, 2]].all()


def test_a_class_that_a_silo_does_not_annotate_is_in_no_softmax() -> None:
    task = MaskedTask(task="classification", labels=("a", "b", "c"), annotates=("c", "b"))
    loss = at_silo(task).loss(task)
    assert loss is not None
    found = loss(SimpleNamespace(logits=LOGITS), torch.tensor([2, 1]))
    e = np.exp(LOGITS.double().numpy())
    expected = -np.mean([np.log(e[0, 2] / (e[0, 1] + e[0, 2])), np.log(e[1, 1] / (e[1, 1] + e[1, 2]))])
    assert float(found) == pytest.approx(expected, rel=1e-6)
    # Nor is it predicted: "a" has the highest logit in the second example.
    sums = count({"labels": torch.tensor([2, 1])}, Outputs(LOGITS), task, None)
    assert confusion(sums).tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_where_all_is_annotated_the_loss_is_the_models_own() -> None:
    everything = MaskedTask(task="classification", labels=("a", "b"), annotates=("b", "a"))
    assert at_silo(everything).loss(everything) is None
    several = Task(task="multi-label", labels=("a", "b", "c"))
    loss = at_silo(several).loss(several)
    assert loss is not None
    labels = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    assert torch.equal(loss(SimpleNamespace(logits=LOGITS), labels), torch.nn.BCEWithLogitsLoss()(LOGITS, labels))


def test_a_label_is_predicted_from_its_threshold_on() -> None:
    task = Task(task="multi-label", labels=("a", "b", "c"), threshold=0.6)
    batch = {"labels": torch.tensor([[1.0, 1.0, 0.0]])}
    logits = torch.logit(torch.tensor([[0.61, 0.59, 0.1]]))
    assert count(batch, Outputs(logits), task, None).tolist() == [1, *(1, 0, 0, 0), *(0, 0, 1, 0), *(0, 0, 0, 1)]

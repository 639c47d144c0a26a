"""What the sum of an honest, secure run tells of the words in the silos' data.

The coordinator plays by the rules. It has what everybody in the plan has, the base model, and so knows what the first
layer behind the frozen embeddings sees of every word at every place. It gets the sum over four silos, whose texts are
made of half of the 60 words that there are, and wants to know which half. Whoever guesses has 15 of these 30 right, and
more than 22 in one of 25,000 tries.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

from gramfuse_client.data.batches import Encoded, batches
from gramfuse_client.data.examples import Examples
from gramfuse_client.measuring.collect import collect_statistics
from gramfuse_client.training.finetune import finetune
from gramfuse_model.derive_layout import derive_layout
from gramfuse_model.normal_equations import summands
from gramfuse_model.parameters import freeze, trainable
from gramfuse_protocol.contract.layout import Layout
from gramfuse_protocol.contract.plan_sections import ContextFree, Merge, Training
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.secure_sum.fixed_point import decode, encode
from gramfuse_protocol.secure_sum.scales import scales
from tests.projects import bert_config

Floats = NDArray[np.float64]

SILOS, TEXTS, LENGTH = 4, 40, 5
SPECIAL = ["[PAD]", "[CLS]", "[SEP]"]
WORDS = [f"word{n}" for n in range(60)]
SECRET = sorted(random.Random(5).sample(WORDS, 30))
"""What the silos' texts are made of."""

PLACES = range(1, LENGTH + 1)
CANDIDATES = [(word, place) for word in WORDS for place in PLACES]
BY_CHANCE = 22
"""Most words that guesses have right, but for one try in 25,000."""

CPU = torch.device("cpu")
TASK = Task(task="classification", labels=("even", "odd"), max_length=LENGTH + 2)
LAYER = "bert.encoder.layer.0"
FIRST = f"{LAYER}.attention.self.query"
"""The first layer's group, where it has one."""

WIDTH, NARROW = 64, 16
"""Features of a model of more than there are words, and of one of fewer."""

CONTEXT = ("attention.output.dense", "intermediate.dense")
"""Layers that see context, of which Gram matrices leave."""


def a_model(width: int) -> BertForSequenceClassification:
    torch.manual_seed(4)
    sizes = {"hidden_size": width, "intermediate_size": width, "max_position_embeddings": 16}
    config = bert_config(len(SPECIAL) + len(WORDS), **sizes, initializer_range=0.2, num_labels=2)
    model = BertForSequenceClassification(config).eval()
    freeze(model, ("embeddings",))
    return model


def a_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({token: n for n, token in enumerate([*SPECIAL, *WORDS])}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")


def texts_of(silo: int) -> list[list[str]]:
    rng = random.Random(silo)
    favourites = rng.sample(SECRET, 12) * 2 + SECRET  # silos differ
    return [rng.choices(favourites, k=rng.randint(3, LENGTH)) for _ in range(TEXTS)]


TOKENIZER = a_tokenizer()
EXAMPLES = [
    Examples([" ".join(t) for t in texts], None, [SECRET.index(t[0]) % 2 for t in texts])
    for texts in map(texts_of, range(SILOS))
]
TOKENS = [sum(len(t) + 2 for t in texts_of(silo)) for silo in range(SILOS)]
OFTEN: Counter[tuple[str, int]] = Counter()
"""The truth: how often each word stands at each place, as a share of each silo's tokens, added up."""
for _silo, _tokens in enumerate(TOKENS):
    for _text in texts_of(_silo):
        for _place, _word in enumerate(_text, 1):
            OFTEN[_word, _place] += 1 / _tokens  # type: ignore[assignment]


@dataclass
class Sums:
    """What the coordinator has: the base model, the layout, and the sum, decoded."""

    model: BertForSequenceClassification
    layout: Layout
    blocks: Mapping[str, Floats]

    def gram(self, group: str) -> Floats:
        """S of a group as (d, d); what a secure sum has of the off-diagonal is α of it."""
        (found,) = (g for g in self.layout.groups if g.name == group)
        s = self.blocks[f"s:{group}"]
        if found.structure == "diagonal":
            return np.diag(s)
        ((square,),) = found.blocks.unpack(s)
        whole: Floats = (square - np.diag(np.diag(square))) / 0.9 + np.diag(np.diag(square))
        return whole


def _tuned(width: int) -> list[BertForSequenceClassification]:
    models = [a_model(width) for _ in EXAMPLES]
    for model, examples in zip(models, EXAMPLES, strict=True):
        training = Training(epochs=3, learning_rate=2e-3, batch_size=8)
        finetune(model, Encoded(examples, TOKENIZER, TASK), training, CPU)
    return models


def _sums(models: list[BertForSequenceClassification], context_free: ContextFree) -> Sums:
    """What the coordinator decodes after an honest run over these silos' models."""
    base = a_model(models[0].config.hidden_size)
    texts = [" ".join(WORDS[n : n + LENGTH - n % 3]) for n in range(0, 59, 5)]
    public = dict(TOKENIZER(texts, padding=True, return_tensors="pt"))
    layout = derive_layout(base, public, Merge(context_free=context_free), scaled=True)
    total: dict[str, NDArray[np.uint64]] = {}
    for model, examples in zip(models, EXAMPLES, strict=True):
        found = batches(Encoded(examples, TOKENIZER, TASK), 16, CPU)
        sent = collect_statistics(model, found, layout, base=trainable(base), examples=len(examples))
        own = summands(layout, sent, alpha=0.9, weighting="uniform")
        for (block, values), (_, scale) in zip(own, scales(layout, SILOS, "uniform"), strict=True):
            words = encode(values, scale, SILOS, block.name).reshape(block.shape)
            total[block.name] = total.get(block.name, np.uint64(0)) + words
    blocks = {block.name: decode(total[block.name], scale) for block, scale in scales(layout, SILOS, "uniform")}
    return Sums(base, layout, blocks)


@pytest.fixture(scope="module")
def run() -> Callable[..., Sums]:
    """Return a function: the sum of an honest run under a plan with that `merge.context-free`, over models so wide."""
    tuned = {width: _tuned(width) for width in (WIDTH, NARROW)}
    return lambda context_free, width=WIDTH: _sums(tuned[width], context_free)


# What the coordinator computes


def seen(model: BertForSequenceClassification, module: nn.Module, rows: list[list[int]]) -> Floats:
    """What enters a module for each token of some texts of one length: (texts, length, d)."""
    got: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, arguments: got.append(arguments[0]))
    with torch.no_grad():
        model(input_ids=torch.tensor(rows))
    handle.remove()
    return got[0].double().numpy()


def dictionary(model: BertForSequenceClassification, module: nn.Module, contexts: int = 1) -> Floats:
    """What a module sees of each candidate, (candidates, d): the mean over so many texts of words drawn at random."""
    rng = random.Random(1)
    total = np.zeros((len(WORDS), len(PLACES), module.in_features))
    first = len(SPECIAL)
    for _ in range(contexts):
        for place in PLACES:
            text = [1, *(first + rng.randrange(len(WORDS)) for _ in PLACES), 2]
            rows = [[*text[:place], first + word, *text[place + 1 :]] for word in range(len(WORDS))]
            total[:, place - 1] += seen(model, module, rows)[:, place] / contexts
    return total.reshape(len(CANDIDATES), -1)


def special(model: BertForSequenceClassification, module: nn.Module) -> Floats:
    """What a module sees of the tokens that every text has: (1 + lengths, d)."""
    texts = [seen(model, module, [[1, *range(3, 3 + length), 2]])[0] for length in range(3, LENGTH + 1)]
    return np.stack([texts[0][0], *(text[-1] for text in texts)])


def solved(gram: Floats, known: Floats, *, diagonal: bool = False) -> Floats:
    """How often each candidate occurs, by non-negative least squares over the entries of a Gram matrix.

    Args:
        known: what the layer sees of each candidate, and after them of other tokens.
    """
    i, j = (np.arange(len(gram)),) * 2 if diagonal else np.triu_indices(len(gram))
    weight = np.where(i == j, 1.0, np.sqrt(2.0))
    found, _ = nnls((known[:, i] * known[:, j] * weight).T, gram[i, j] * weight, maxiter=20_000)
    return np.asarray(found[: len(CANDIDATES)], np.float64)


def right(scores: Floats) -> int:
    """How many of the 30 words with the highest scores, over all places, are the silos'."""
    by_word = scores.reshape(len(WORDS), len(PLACES)).sum(axis=1)
    return len({WORDS[n] for n in np.argsort(-by_word)[: len(SECRET)]} & set(SECRET))


# What it gets


def test_from_full_gram_matrices_of_the_first_layer_every_word_place_and_frequency_is_solved_for(
    run: Callable[..., Sums],
) -> None:
    sums = run("full")
    query = sums.model.bert.encoder.layer[0].attention.self.query
    known = np.concatenate([dictionary(sums.model, query), special(sums.model, query)])
    often = solved(sums.gram(FIRST), known)
    assert right(often) == len(SECRET)
    np.testing.assert_allclose(often, [OFTEN[candidate] for candidate in CANDIDATES], atol=1e-5)


def test_by_default_no_product_of_what_the_first_layer_sees_is_in_the_sum(run: Callable[..., Sums]) -> None:
    sums = run("mean")
    weights = {f"{LAYER}.attention.self.{name}.weight" for name in ("query", "key", "value")}
    assert {tensor.name for tensor in sums.layout.tensors if tensor.context_free} == weights
    of_weights = {name for name in sums.blocks if any(name.endswith(f":{weight}") for weight in weights)}
    assert of_weights == {f"m:{weight}" for weight in weights}
    assert not {f"s:{FIRST}", f"t:{FIRST}"} & set(sums.blocks)
    assert not weights & {weight.weight for group in sums.layout.groups for weight in group.weights}


def test_changes_of_the_first_layer_tell_hardly_more_words_than_guesses(run: Callable[..., Sums]) -> None:
    """Changes are sums of what the layer sees times gradients; words that never stood there might move it less."""
    sums = run("mean")
    attention = sums.model.bert.encoder.layer[0].attention
    x = dictionary(sums.model, attention.self.query)
    x -= x.mean(axis=0)
    found = {}
    for name in ("query", "key", "value"):
        change = sums.blocks[f"m:{LAYER}.attention.self.{name}.weight"]
        found[name] = right(np.linalg.norm(x @ change.T, axis=1))
        weight = getattr(attention.self, name).weight.detach().double().numpy()
        found[f"{name}, bias"] = right(x @ weight.T @ sums.blocks[f"m:{LAYER}.attention.self.{name}.bias"])
    norm = {name: sums.blocks[f"m:{LAYER}.attention.output.LayerNorm.{name}"] for name in ("weight", "bias")}
    found |= {"norm, weight": right(x * x @ norm["weight"]), "norm, bias": right(x @ norm["bias"])}
    assert max(found.values()) <= BY_CHANCE, found


def test_layers_with_context_still_tell_most_words_where_these_are_fewer_than_features(
    run: Callable[..., Sums],
) -> None:
    """What is left, and what docs/threat-model.md says: the feed-forward layer sees a word, blurred by its context.

    The coordinator takes for a word what the layer sees of it in texts of random words, on average. No frequency can be
    solved for, but 1 / xᵀ S⁻¹ x, the largest share that a candidate can have of a Gram matrix, is small for words that
    never came. Where words are many times as many as features, little of that is left.
    """
    found = {(width, name): blurred(run("mean", width), name) for width in (WIDTH, NARROW) for name in CONTEXT}
    assert found[WIDTH, "intermediate.dense"] > BY_CHANCE
    assert found[NARROW, "intermediate.dense"] <= found[WIDTH, "intermediate.dense"]


def blurred(sums: Sums, name: str) -> int:
    """How many words are right by their largest share of the Gram matrix of a layer that sees context."""
    module = sums.model.get_submodule(f"{LAYER}.{name}")
    x, gram = dictionary(sums.model, module, contexts=8), sums.gram(f"{LAYER}.{name}")
    inverse = np.linalg.inv(gram + 1e-6 * np.trace(gram) / len(gram) * np.eye(len(gram)))
    return right(1 / np.einsum("ij,jk,ik->i", x, inverse, x))


def test_diagonals_of_a_wide_layer_tell_words_and_places_exactly_too_so_none_leave_by_default() -> None:
    """Nothing is trained: behind frozen embeddings, the first layer sees the same in every fine-tuned model."""
    few, wide = 24, 256
    model = a_model(wide)
    assert len(PLACES) * few < wide
    query = model.bert.encoder.layer[0].attention.self.query
    known = dictionary(model, query).reshape(len(WORDS), len(PLACES), wide)[:few].reshape(-1, wide)
    rng = np.random.default_rng(3)
    often = rng.integers(1, 9, len(known)) * (rng.random(len(known)) < 0.5)
    gram = (known * often[:, None]).T @ known
    found, _ = nnls((known**2).T, np.diag(gram))
    np.testing.assert_allclose(found, often, atol=1e-3)

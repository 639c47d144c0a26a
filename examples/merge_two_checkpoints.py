"""Merge two Hugging Face classifiers that were fine-tuned from one base, with nothing but their models and data.

    python examples/merge_two_checkpoints.py BASE MODEL_A DATA_A MODEL_B DATA_B OUT

Models are directories or hub ids, data are JSON lines with "text". Both models have the same labels.
"""

import json
import random
import sys
from pathlib import Path

from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

import gramfuse

base_name, *pairs, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base_name, trust_remote_code=False)
config = AutoConfig.from_pretrained(pairs[0], trust_remote_code=False)
base = AutoModelForSequenceClassification.from_pretrained(
    base_name,
    num_labels=config.num_labels,
    id2label=config.id2label,
    label2id=config.label2id,
    trust_remote_code=False,  # nobody's code is run, and no pickle is opened
    use_safetensors=True,
)


def texts_of(data: str) -> list[str]:
    """Return the texts of a file of JSON lines."""
    return [json.loads(line)["text"] for line in Path(data).read_text(encoding="utf-8").splitlines()]


# Texts of different words that the tokenizer knows: by them it is seen which layers take words without their context.
layout = gramfuse.derive_layout(base, tokenizer(texts_of(pairs[1])[:16], padding=True, return_tensors="pt"))
start = gramfuse.trainable(base)

statistics = []
for model_name, data in zip(pairs[::2], pairs[1::2], strict=True):
    model, loaded = AutoModelForSequenceClassification.from_pretrained(
        model_name, output_loading_info=True, trust_remote_code=False, use_safetensors=True
    )
    if missing := loaded["missing_keys"]:  # what a file lacks, transformers makes up
        sys.exit(f"{model_name} has no {', '.join(sorted(missing))}")
    texts = texts_of(data)
    random.Random(1).shuffle(texts)  # noqa: S311  # only so many are measured, which must stand for all
    batches = (
        tokenizer(texts[i : i + 16], padding=True, truncation=True, max_length=128, return_tensors="pt")
        for i in range(0, len(texts), 16)
    )
    statistics.append(gramfuse.collect_statistics(model, batches, layout, base=start, examples=len(texts)))

merged = gramfuse.merge(statistics, layout, alpha=0.9)
gramfuse.add_differences(base, merged.deltas)
base.save_pretrained(out)
tokenizer.save_pretrained(out)
print(f"{len(merged.steps)} groups of layers merged in closed form: {out}")

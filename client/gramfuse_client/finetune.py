"""Local fine-tuning: AdamW, linear warm-up and decay, by the transformers Trainer."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging

from gramfuse_client.batches import Encoded
from gramfuse_protocol.errors import PlanError
from gramfuse_protocol.plan import Training

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


def choose_device(name: str) -> torch.device:
    """Return the device that a silo file names; `auto` takes CUDA, then MPS, then the CPU.

    Raises:
        PlanError: if the one that is named is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, available in there.items() if available)
    elif not there[name]:
        raise PlanError(f"device = {name!r} in the silo file: torch finds none here; use 'auto' or 'cpu'")
    return torch.device(name)


def finetune(
    model: PreTrainedModel,
    encoded: Encoded,
    training: Training,
    device: torch.device,
    progress: Progress | None = None,
) -> None:
    """Fine-tune `model` in place for the examples' task; frozen parameters stay as they are.

    The result is a function of the arguments, the device and the number of CPU threads, and of nothing else.

    Raises:
        DataError: if there is nothing to learn from an example.
    """
    encoded.check_learnable()
    steps = -(-len(encoded) // training.batch_size) * training.epochs
    with tempfile.TemporaryDirectory(prefix="gramfuse-") as scratch, torch.random.fork_rng():
        arguments = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=training.batch_size,
            num_train_epochs=training.epochs,
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
            warmup_steps=round(training.warmup * steps),
            lr_scheduler_type="linear",
            optim="adamw_torch_fused",
            bf16=training.precision == "bfloat16",
            seed=training.seed,
            data_seed=training.seed,
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=device.type == "cuda",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            train_sampling_strategy="random" if encoded.rows is None else "group_by_length",
            disable_tqdm=not sys.stderr.isatty(),
        )
        level = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            trainer = Trainer(
                model=model,
                args=arguments,
                train_dataset=encoded,
                data_collator=encoded.collate,
                compute_loss_func=encoded.kind.loss(encoded.task),
                callbacks=[] if progress is None else [_Report(progress)],
            )
            trainer.remove_callback(PrinterCallback)  # it writes to standard output, which is the command's
            trainer.train()
        finally:
            logging.set_verbosity(level)
    model.eval()


class _Report(TrainerCallback):
    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(state.global_step, state.max_steps)

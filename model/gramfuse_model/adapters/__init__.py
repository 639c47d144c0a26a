"""Adapters (LoRA): where they sit in a model, their frozen matrices, and how they are saved or folded in."""

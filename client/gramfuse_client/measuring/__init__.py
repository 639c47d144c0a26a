"""Measures a fine-tuned model's statistics."""

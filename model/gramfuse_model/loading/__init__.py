"""A base model, or a fine-tuned one, from its files."""

"""Loading of base models and fine-tuned models from their files."""

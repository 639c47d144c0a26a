"""A silo's examples: read, checked, split, and as batches of tensors."""

"""Reads, checks and splits a silo's examples, and makes batches of tensors."""

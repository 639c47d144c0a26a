"""The base model on both sides: loading, linear weights, layout derivation."""

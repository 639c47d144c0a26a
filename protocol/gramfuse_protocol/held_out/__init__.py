"""Held-out evaluation: per-silo sums that add up to metrics, exact or with noise."""

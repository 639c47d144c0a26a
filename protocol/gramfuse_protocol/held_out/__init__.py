"""What silos say of held-out examples: sums that add up to metrics, exact or with noise."""

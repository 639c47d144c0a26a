"""Fine-tuning at a silo, and how well models do on its held-out examples."""

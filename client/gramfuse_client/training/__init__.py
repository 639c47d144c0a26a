"""Fine-tunes a model at a silo, and evaluates models on its held-out examples."""

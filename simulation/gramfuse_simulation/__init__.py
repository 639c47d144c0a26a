"""All silos in one process: simulations, comparisons, tuning."""

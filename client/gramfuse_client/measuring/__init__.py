"""What a silo measures of a fine-tuned model."""

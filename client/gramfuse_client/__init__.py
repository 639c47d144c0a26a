"""The silo's side of gramfuse."""

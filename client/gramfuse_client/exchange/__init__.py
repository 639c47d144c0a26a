"""A silo's side of a run, message by message."""

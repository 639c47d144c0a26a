"""A silo's state on disk between messages."""

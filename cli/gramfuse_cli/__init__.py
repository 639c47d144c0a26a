"""The `gramfuse` command."""

"""The messages between coordinator and silos, and their encoding."""

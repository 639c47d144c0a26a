"""Probing: properties of a base model that are found by running it on public inputs."""

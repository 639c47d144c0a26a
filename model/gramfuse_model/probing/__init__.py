"""What is found out about a base model by running it on public inputs."""

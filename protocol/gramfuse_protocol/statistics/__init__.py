"""What a silo measured, in memory and as a file."""

"""A silo's statistics, in memory and as a file."""

"""What runs at a silo."""

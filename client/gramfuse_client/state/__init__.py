"""What a silo keeps on its disk between messages."""

"""`gramfuse silo check`: what keeps a silo from taking part, and what would leave it."""

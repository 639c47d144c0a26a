"""`gramfuse silo check`: finds what prevents a silo from taking part, and lists what it would send."""

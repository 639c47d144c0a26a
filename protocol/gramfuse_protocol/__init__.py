"""The protocol between silos and coordinator. Depends on numpy, pydantic and cryptography, not on torch."""

"""What may leave a silo: its policy, its ledger, and the way out."""

"""Controls what leaves a silo: its policy, its ledger, and the egress mod."""

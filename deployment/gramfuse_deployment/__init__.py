"""The processes of a real deployment, at the coordinator and at silos."""

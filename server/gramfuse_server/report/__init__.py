"""What a run leaves for people: report.json, the model card, and the page."""

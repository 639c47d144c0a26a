"""What a silo and the coordinator must agree on. Needs numpy and pydantic; knows neither torch nor Flower."""

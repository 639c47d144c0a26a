"""A run between silos, from the first message to the merged model."""

"""From statistics to a merged model: RegMean, its solver, its checks, and other methods."""

"""One table per model family: what its config.json means, and what its parameters are called."""

"""The decoder, and what it has to know of a model."""

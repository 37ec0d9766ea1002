"""Load generators and benchmarks; each is a command."""

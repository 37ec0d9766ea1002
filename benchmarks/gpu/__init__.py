"""What a GPU does: the tests that need one, its ops and steps against its own ceilings, a service. `make gpu-check`."""

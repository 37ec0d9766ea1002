"""What the processes have in common: configuration, RPC, the engine, the KV handoff."""

"""One model computed by several ranks: what each has of it (sharding.py), and how they exchange it (group.py)."""

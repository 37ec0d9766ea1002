"""The engine's ops, one file each: formula, plain-torch reference, and a launcher that checks its contract."""

"""Holds reservations, imports KV blocks and generates tokens."""

"""Computes prompts and hands their KV blocks over."""

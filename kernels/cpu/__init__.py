"""The CPU ops in C and the loader that compiles them."""

"""How KV blocks travel: a prefill worker exports its pool, a decode worker copies out of it and never writes into it.

exporter.py serves a pool, importer.py copies from it. Below them, best first: a memory file whose descriptor crosses a
unix socket (pool_memory.py, descriptor_socket.py, mapping.py), and bytes over KvService.Fetch.
"""

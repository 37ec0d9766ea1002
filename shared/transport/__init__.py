"""How KV blocks travel: a prefill worker exports its pool, a decode worker copies out of it and never writes into it.

exporter.py serves a pool, pair.py agrees on the best transport that works, importer.py moves tokens into the worker's
own pool (target.py). The transports, best first: a CUDA device's memory (cuda.py, device_pool.py, device_mapping.py), a
memory file (pool_memory.py, mapping.py), both reached by unix sockets (descriptor_socket.py), and bytes over
KvService.Fetch.
"""

"""A stand-in for a role process, for the supervisor's own tests: says what it was told, and ends as it was told."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

role, *flags = sys.argv[1:]
settings = dict(flag.split("=", 1) for name, flag in itertools.pairwise(flags) if name == "--set")
behaviour = json.loads(settings.get("fake", '"serve"'))

print(f"hello from {role}", file=sys.stderr, flush=True)
if behaviour == "die":
    print("cannot go on", file=sys.stderr, flush=True)
    sys.exit(3)
if behaviour == "silent":
    time.sleep(60)
if behaviour == "grandchild":
    print("grandchild", subprocess.Popen(["sleep", "60"]).pid, file=sys.stderr, flush=True)
if behaviour == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))

section = {"gateway": "gateway", "prefill_worker": "prefill", "decode_worker": "decode"}[role]
port = int(settings.get(f"{section}.port", "0")) or 20000 + os.getpid() % 10000
http = f"127.0.0.1:{int(settings.get('gateway.http_port', '0')) or 8}" if role == "gateway" else None
ready = {
    "event": "ready",
    "role": role,
    "grpc": f"127.0.0.1:{port}",
    "http": http,
    "pid": os.getpid(),
    "worker_id": "w",
}
print("settings", json.dumps(settings), file=sys.stderr, flush=True)
print(json.dumps(ready), flush=True)
while True:
    signal.pause()

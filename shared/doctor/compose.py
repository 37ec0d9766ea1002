"""What a container needs, as one pastes it: a service's keys in compose.yaml, a pod's in Kubernetes.

settings("open files", nofile=65536)   # both, for a remedy to quote

COMPOSE and KUBERNETES hold the same with the values of DEFAULTS. compose.yaml is tested against COMPOSE: what a remedy
asks for is what the file gives.
"""

from __future__ import annotations

import textwrap

# For a remedy that knows no better; the memory is that of the default model with the default pools.
DEFAULTS = {"memory": "4g", "quantity": "4Gi", "cpus": 2, "nofile": 65536, "pids": 4096}

# check -> keys of a service
_COMPOSE = {
    "gpu driver": """
        deploy:
          resources:
            reservations:
              devices:
                - driver: nvidia
                  count: all
                  capabilities: [gpu]
        """,
    "gpu capabilities": """
        environment:
          NVIDIA_DRIVER_CAPABILITIES: compute,utility
        """,
    "gpu visibility": """
        environment:
          NVIDIA_VISIBLE_DEVICES: all
        """,
    "gpu order": """
        environment:
          CUDA_DEVICE_ORDER: PCI_BUS_ID
        """,
    "namespaces": """
        pid: host
        ipc: host
        """,
    "socket folder": """
        volumes:
          - sockets:/run/tandem
        environment:
          TANDEM_TRANSPORT__SOCKET_DIR: /run/tandem
        """,
    "cache": """
        volumes:
          - cache:/cache
        environment:
          XDG_CACHE_HOME: /cache
        """,
    "temporary folder": """
        tmpfs:
          - /tmp
        """,
    "user": """
        user: "1000:1000"
        """,
    "open files": """
        ulimits:
          nofile: {nofile}
        """,
    "locked memory": """
        ulimits:
          memlock: -1
        """,
    "processes": """
        pids_limit: {pids}
        """,
    "memory": """
        mem_limit: {memory}
        """,
    "cpu quota": """
        cpus: {cpus}
        environment:
          TANDEM_THREADS: {cpus}
        """,
}

# check -> keys of a pod's spec; what Kubernetes has no key for is missing, and its remedy says what to do instead
_KUBERNETES = {
    "gpu driver": """
        containers:
          - resources:
              limits:
                nvidia.com/gpu: 1
        """,
    "gpu capabilities": """
        containers:
          - env:
              - name: NVIDIA_DRIVER_CAPABILITIES
                value: compute,utility
        """,
    "gpu visibility": """
        containers:
          - resources:
              limits:
                nvidia.com/gpu: 1
        """,
    "gpu order": """
        containers:
          - env:
              - name: CUDA_DEVICE_ORDER
                value: PCI_BUS_ID
        """,
    "namespaces": """
        hostPID: true
        hostIPC: true
        """,
    "socket folder": """
        containers:
          - env:
              - name: TANDEM_TRANSPORT__SOCKET_DIR
                value: /run/tandem
            volumeMounts:
              - name: sockets
                mountPath: /run/tandem
        volumes:
          - name: sockets
            hostPath:
              path: /run/tandem
              type: DirectoryOrCreate
        """,
    "cache": """
        containers:
          - env:
              - name: XDG_CACHE_HOME
                value: /cache
            volumeMounts:
              - name: cache
                mountPath: /cache
        volumes:
          - name: cache
            persistentVolumeClaim:
              claimName: tandem-cache
        """,
    "temporary folder": """
        containers:
          - volumeMounts:
              - name: tmp
                mountPath: /tmp
        volumes:
          - name: tmp
            emptyDir: {{}}
        """,
    "user": """
        securityContext:
          runAsUser: 1000
          runAsGroup: 1000
          fsGroup: 1000
        """,
    "memory": """
        containers:
          - resources:
              limits:
                memory: {quantity}
        """,
    "cpu quota": """
        containers:
          - resources:
              limits:
                cpu: {cpus}
            env:
              - name: TANDEM_THREADS
                value: "{cpus}"
        """,
}


def _filled(template: str, values: dict[str, object]) -> str:
    return textwrap.dedent(template).strip("\n").format(**{**DEFAULTS, **values}) + "\n"


COMPOSE: dict[str, str] = {check: _filled(template, {}) for check, template in _COMPOSE.items()}
KUBERNETES: dict[str, str] = {check: _filled(template, {}) for check, template in _KUBERNETES.items()}
# What every deployment in containers wants; the rest is for hosts with GPUs, or depends on the model and the limits.
EVERYWHERE = ("socket folder", "cache", "temporary folder", "user", "open files")


def settings(check: str, **values: object) -> str:
    """The keys of a check with these values for those of DEFAULTS, for both places.

    Raises KeyError for a check that is no row of COMPOSE.
    """
    parts = [("compose.yaml, in the service", _filled(_COMPOSE[check], values))]
    if check in _KUBERNETES:
        parts.append(("Kubernetes, in the pod's spec", _filled(_KUBERNETES[check], values)))
    return "\n".join(f"{place}:\n{textwrap.indent(text, '  ')}".rstrip() for place, text in parts)

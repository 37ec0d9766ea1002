"""How each kind of finding is mended: the one table of it.

`{settings:open files}` stands for that row of compose.py, other names in braces for what the check found.
"""

from __future__ import annotations

REMEDIES: dict[str, str] = {
    # host
    "cpu ops not built": "install gcc, and let XDG_CACHE_HOME name a folder to write to",
    "no vector instructions": "use an x86 CPU with AVX2, or better with AVX-512 BF16",
    "one core": "give the processes two cores or more",
    "cores not shared": "let TMPDIR name a folder that the workers of this host share",
    "host too small": (
        "lower prefill.kv_memory_mib, decode.kv_memory_mib or decode.swap_memory_mib, or start fewer workers"
    ),
    "host memory taken": "end what takes it, or lower prefill.kv_memory_mib and decode.kv_memory_mib",
    "strict overcommit": "sysctl -w vm.overcommit_memory=0   # and in /etc/sysctl.d to keep it",
    "no memory files": (
        "let the seccomp profile allow memfd_create, as Docker's and containerd's own do. With those:\n"
        "compose.yaml, in the service:\n"
        "  security_opt: []\n"
        "Kubernetes, in the pod's spec:\n"
        "  securityContext:\n"
        "    seccompProfile:\n"
        "      type: RuntimeDefault"
    ),
    # the folder of sockets
    "socket path too long": "{settings:socket folder}",
    "socket folder unusable": (
        "let the workers' user own the folder, and let it be writable:\n"
        "  install -d -m 700 -o {uid} {folder}\n"
        "or take another one:\n{settings:socket folder}"
    ),
    "socket folder open to others": "chmod go-w {folder}",
    "socket folder not shared": "mount one volume there in every worker's container:\n{settings:socket folder}",
    "no handoff": "take one on a file system that knows unix sockets (ext4, xfs, tmpfs):\n{settings:socket folder}",
    # software
    "torch without CUDA": "install torch's build for CUDA 12 or later, or set `device: cpu`",
    "no triton": "{python} -m pip install triton",
    "CUDA newer than the driver": "install the NVIDIA driver of CUDA {cuda}, or torch's build for CUDA {driver_cuda}",
    "kernels is installed": "{python} -m pip uninstall kernels",
    "allocator of the driver": "take `backend:cudaMallocAsync` out of {variable}",
    # container
    "root": "{settings:user}",
    "cache not writable": "mount a volume, which also keeps models and compiled ops over restarts:\n{settings:cache}",
    "temporary folder not writable": "{settings:temporary folder}",
    "namespaces not shared": (
        "take the export that needs no namespace in common:\n"
        "  transport:\n"
        "    cuda_export: descriptor\n"
        "or give all workers one:\n{settings:namespaces}"
    ),
    "another PID namespace": (
        "take the export that needs no namespace in common:\n"
        "  transport:\n"
        "    cuda_export: descriptor\n"
        "or give all workers one:\n{settings:namespaces}"
    ),
    "memory limit too low": "{settings:memory}",
    "memory limit below all workers": "for all workers in one container:\n{settings:memory}",
    "CPU quota": "let each worker count the cores that it has the time of, or give it more:\n{settings:cpu quota}",
    "few open files": (
        "{settings:open files}\n"
        "Kubernetes: raise LimitNOFILE of the node's container runtime\n"
        "a shell: ulimit -n {nofile}"
    ),
    "few processes": (
        "{settings:processes}\nKubernetes: raise podPidsLimit in the kubelet's configuration\na shell: ulimit -u {pids}"
    ),
    "little locked memory": "{settings:locked memory}\nKubernetes: raise LimitMEMLOCK of the node's container runtime",
    # GPU
    "no nvidia-ml-py": "{python} -m pip install nvidia-ml-py",
    "driver library missing": (
        "let NVIDIA's container runtime bring them (nvidia-ctk runtime configure):\n{settings:gpu driver}"
    ),
    "driver not loaded": "modprobe nvidia nvidia_uvm   # on the host; `dmesg | grep NVRM` says why where that fails",
    "driver versions differ": "restart the host: the driver was updated under the running kernel module",
    "NVML fails": "nvidia-smi   # on the host: it should show the GPUs; `dmesg | grep NVRM` says what is wrong",
    "no GPU": "give the container one, or set `device: cpu`:\n{settings:gpu driver}",
    "driver too old": "install an NVIDIA driver of version 525 or later on the host",
    "capabilities missing": "{settings:gpu capabilities}",
    "GPUs not given": "{settings:gpu visibility}",
    "GPUs hidden": "unset CUDA_VISIBLE_DEVICES   # or let it name every GPU that a worker's pool lies on",
    "too few GPUs": "let CUDA_VISIBLE_DEVICES name {ranks} GPUs, and the container have them, or set a smaller `tp`",
    "GPUs in another order": "{settings:gpu order}",
    "MIG": "nvidia-smi -i {gpus} -mig 0   # with nothing running there; where MIG is meant, nothing is to be done",
    "no peer access": (
        "nvidia-smi topo -p2p r   # shows it. On bare metal turn PCIe ACS and the IOMMU off in the firmware, "
        "or let the workers of a pair use GPUs that reach each other"
    ),
    "IOMMU": "iommu=pt   # on the kernel's command line, or off in the firmware; right as it is in a virtual machine",
    "GPU slowed down": "nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER   # and look at its cooling and power",
    "persistence mode off": "nvidia-smi -pm 1   # or enable nvidia-persistenced, which keeps it over restarts",
    # cluster
    "address unknown": "let gateway.{key} name a host that resolves here: getent hosts {host}",
    "no answer": (
        "look whether the process runs and listens there (ss -ltn), and, where it is to be reached from other hosts, "
        "that it listens there too:\n"
        "  {section}:\n"
        "    host: 0.0.0.0"
    ),
    "not a worker": "let gateway.{key} name the {role} worker's own address, which its ready line tells",
    "key refused": (
        "give every process the same key (TANDEM_AUTH__CLUSTER_KEY, or in tandem.yaml):\n  auth:\n    cluster_key: ..."
    ),
    "other role": "list it in gateway.{key} instead",
    "not serving": "its log says why; a worker that drains, or whose engine hangs, takes no request: start it again",
    "models differ": "start every process with the same `model`, `quantization` and `quantization_exclude`",
    "model differs here": (
        "give this host the workers' `model`, `quantization`, `quantization_exclude` and `served_name`"
    ),
    "layouts differ": (
        "start both with the same `dtype` and kv_dtype, or let decode convert:\n  transport:\n    convert_dtype: true"
    ),
    "versions differ": "run one image, or one checkout with `make setup`, everywhere",
    "no handshake": "start the gateway, which lets each pair shake hands; its log says why one could not",
    "slower transport": "mend what is named; for containers on one host:\n{settings:socket folder}",
    "below transport.require": ("mend what is named, or allow it:\n  transport:\n    require: {transport}"),
    # the doctor itself
    "check failed": "tandem doctor --json   # to report it with; the other findings hold",
}

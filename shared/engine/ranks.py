"""The ranks that an engine computes on, as its options say it, and what has to be alike on all of them.

tp_size      the first so many ranks of torch.distributed, which is started as torchrun says it where it is not yet
mpu          an object that has the group of this rank
tp_group     the group itself
ep_size      of the model's experts, by the same ranks, or where tp_size is 1 by all of torch.distributed
ep_group     the group that experts are divided among, and ep_mp_group the one whose ranks share an expert
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from shared.config.parallel import MoeConfig, TensorParallelConfig
from shared.parallel.expert_groups import ExpertGroups
from shared.parallel.experts import ExpertShard
from shared.parallel.group import Group
from shared.parallel.start import end_group, start_group_of_environment


def group_of(options: TensorParallelConfig, device: str) -> Group | None:
    """None where one process computes alone. Every rank of the default group has to call it.

    device: cpu or cuda. Raises ValueError for a group that is not there, is too small, does not have this process, or
    exchanges no tensors of this device.
    """
    if options.tp_size == 1:
        return None
    given = options.process_group
    group = _first_ranks(options.tp_size, device) if given is None else Group.of(given)
    _check_device("tensor_parallel.tp_size" if given is None else options.group_field, group, device)
    return group


def expert_groups_of(moe: MoeConfig, group: Group | None, device: str) -> ExpertGroups | None:
    """None where the options say nothing of them: ranks that share a model then share each of its experts.

    group: of the ranks that share the model. Every rank has to call this. Raises ValueError naming an option for groups
    that are not there, or whose number of ranks is another.
    """
    if moe.ep_group is None and moe.ep_mp_group is None:
        if moe.ep_size == 1:
            return None
        return ExpertGroups.of(group or _all_ranks(moe.ep_size, device), moe.ep_size)
    ep, mp = (
        _given_group(f"moe.{name}", getattr(moe, name), device) if getattr(moe, name) is not None else None
        for name in ("ep_group", "ep_mp_group")
    )
    if "ep_size" in moe.model_fields_set and moe.ep_size != (ep.size if ep else 1):
        raise ValueError(
            f"moe.ep_size: {moe.ep_size}, and the groups have {ep.size if ep else 1}; leave one of them out"
        )
    return ExpertGroups(ep, mp, group)


def _given_group(name: str, given: object, device: str) -> Group:
    if not isinstance(given, dist.ProcessGroup):
        raise ValueError(f"{name}: wants a torch.distributed process group, has {type(given).__name__}")
    group = Group.of(given)
    _check_device(name, group, device)
    return group


def _all_ranks(ep_size: int, device: str) -> Group:
    if not dist.is_initialized():
        if not os.environ.get("RANK"):
            ExpertShard.of(0, 1, ep_size)  # there is this process alone, and that is too few
        start_group_of_environment(device=device)
    return _first_ranks(dist.get_world_size(), device)


def same_random_state(group: Group) -> None:
    """Rank 0's on all ranks: what is drawn from here on is the same wherever the same is asked for."""
    group_device = group.device
    states = [(torch.get_rng_state, torch.set_rng_state)]
    if group_device.type == "cuda":
        states.append((torch.cuda.get_rng_state, torch.cuda.set_rng_state))
    for get_state, set_state in states:
        set_state(group.broadcast(get_state().to(group_device)).cpu())


def least(group: Group | None, value: int) -> int:
    """Of the ranks' values."""
    if group is None:
        return value
    own = torch.tensor([[value]], dtype=torch.int64, device=group.device)
    return int(group.gather(own, [1] * group.size).min())


def _check_device(name: str, group: Group, device: str) -> None:
    if group.device.type != device:
        raise ValueError(
            f"{name}: the process group exchanges tensors on {group.device.type}, and the model is computed on "
            f"{device}; give one of the other backend, or set keep_module_on_host"
        )


def _first_ranks(size: int, device: str) -> Group:
    is_ours = not dist.is_initialized()
    if is_ours:
        start_group_of_environment(device=device)
    world_size = dist.get_world_size()
    if world_size < size:
        if is_ours:
            end_group()
        raise ValueError(
            f"tensor_parallel.tp_size: {size}, and torch.distributed has {world_size} ranks; start as many, by "
            f"torchrun --nproc-per-node {size}"
        )
    backend = "nccl" if device == "cuda" else "gloo"
    whole = dist.group.WORLD
    assert whole is not None
    if world_size == size and backend in dist.get_backend(whole):
        return Group.of(whole)
    made = dist.new_group(list(range(size)), backend=backend)
    if dist.get_rank() >= size:
        raise ValueError(
            f"tensor_parallel.tp_size: {size}, and this is rank {dist.get_rank()} of {world_size}: the model is "
            f"computed by the first {size}; make it there alone once the group is made, or give tp_group"
        )
    assert isinstance(made, dist.ProcessGroup)
    return Group.of(made)

"""The rank that owns each expert. Plain arithmetic, no torch.

Each rank owns a contiguous block of experts. The ranks of an expert-parallel group are neighbours, so that its
all-to-all stays inside a node. The ranks that hold the same experts form an expert-data group, over which the
gradients of adapters are reduced.
"""


def check_ep(*, num_experts: int, world_size: int, ep: int) -> None:
    """Raise ValueError unless `ep` divides both the ranks and the experts."""
    if ep >= 1 and world_size % ep == 0 and num_experts % ep == 0:
        return
    allowed = [
        size for size in range(1, min(world_size, num_experts) + 1) if not world_size % size | num_experts % size
    ]
    raise ValueError(
        f"parallel.ep: {ep} must divide both the {world_size} ranks and the {num_experts} experts; "
        f"use one of {', '.join(map(str, allowed))}"
    )


def expert_range(*, num_experts: int, ep: int, ep_rank: int) -> range:
    """Return the global ids of the experts that rank `ep_rank` of its expert-parallel group owns."""
    assert num_experts % ep == 0
    assert 0 <= ep_rank < ep
    local = num_experts // ep
    return range(ep_rank * local, (ep_rank + 1) * local)

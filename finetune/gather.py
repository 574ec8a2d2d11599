"""From partitioned ranks to files: one tensor at a time is whole, experts come to rank 0 under their global ids."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from finetune.engine import gathered
from finetune.jsonblock import load_json
from finetune.model import EmptyModel
from finetune.ranks import rank_and_world
from finetune.weights import base_slots
from finetune.writer import model_writer, side_files_of
from moe.experts import GroupedExperts

_STORED_AS = {torch.float32: "F32", torch.bfloat16: "BF16"}


def save(empty: EmptyModel, folder: Path, base: Path) -> None:
    """Write the trained model as a folder in the hub's layout, beside the base's own small files; every rank must call.

    One tensor is whole on the ranks at a time; experts come to rank 0 group by group, under their global ids, and the
    writer refuses to finish while one is missing. Adapters are not in it.
    """
    with ExitStack() as stack:
        writer = None
        if rank_and_world()[0] == 0:
            config = load_json(base / "config.json")
            kinds = {slot.canonical: _STORED_AS[slot.tensor.dtype] for slot in base_slots(empty)}
            writer = stack.enter_context(
                model_writer(folder, shapes=empty.expected, dtypes=kinds, config=config, side_files=side_files_of(base))
            )
        for slot in base_slots(empty):
            with gathered(slot.tensor):
                for first_row, tensor in at_rank_zero(slot.tensor, slot.owners[0][0]):
                    if writer is not None:
                        writer.write(slot.canonical, tensor, first_row=first_row)
    if dist.is_initialized():
        dist.barrier()


def at_rank_zero(tensor: Tensor, owner: nn.Module) -> Iterator[tuple[int, Tensor]]:
    """Yield (0, the whole tensor), or a stack's rows from each rank of the first expert-parallel group.

    Rank 0 sees all experts, by their first global id; another rank its own at most. Every rank must exhaust this.
    """
    rank, _ = rank_and_world()
    whole = tensor.detach()
    if not isinstance(owner, GroupedExperts):
        yield 0, whole
        return
    rows = len(owner.local_experts)
    for source in range(owner.num_experts // rows):
        if source == rank == 0:
            yield 0, whole
        elif rank == source:
            dist.send(whole.contiguous(), dst=0)
        elif rank == 0:
            arrived = torch.empty_like(whole)
            dist.recv(arrived, src=source)
            yield source * rows, arrived

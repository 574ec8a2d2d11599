"""Writes a partitioned model to a folder: gathers one tensor at a time, and sends experts to rank 0 by global id."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch

from finetune.architecture.yarn import extended_config
from finetune.files.jsonblock import load_json
from finetune.files.writer import model_writer, side_files_of
from finetune.model.empty import EmptyModel
from finetune.model.weights import base_slots
from finetune.ranks.collectives import at_rank_zero, barrier, rank_and_world
from finetune.ranks.engine import gathered

_STORED_AS = {torch.float32: "F32", torch.bfloat16: "BF16"}


def save_model(
    empty: EmptyModel, folder: Path, base: Path, *, changed: Mapping[str, bytes] | None = None, replace: bool = False
) -> None:
    """Write the trained model, without adapters, as a folder in the hub's layout; every rank must call this.

    The folder gets the base's small files; `changed` holds those that differ. `replace` overwrites an earlier model.

    Ranks gather one tensor at a time. Experts come to rank 0 group by group, under their global ids, and the writer
    raises an error at the end if one is missing.
    """
    with ExitStack() as stack:
        writer = None
        if rank_and_world()[0] == 0:
            config = extended_config(load_json(base / "config.json"), empty.context)
            kinds = {slot.canonical: _STORED_AS[slot.tensor.dtype] for slot in base_slots(empty)}
            side_files = {**side_files_of(base), **(changed or {})}
            writer = stack.enter_context(
                model_writer(
                    folder,
                    shapes=empty.expected,
                    dtypes=kinds,
                    config=config,
                    side_files=side_files,
                    replace=replace,
                )
            )
        for slot in base_slots(empty):
            with gathered(slot.tensor):
                for first_row, tensor in at_rank_zero(slot.tensor, slot.owners[0][0]):
                    if writer is not None:
                        writer.write(slot.canonical, tensor, first_row=first_row)
    barrier()

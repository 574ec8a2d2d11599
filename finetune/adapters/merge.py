"""Merge a base and an adapter into one model folder: file by file, a block at a time, without building the model.

An unfinished merge never looks finished: the folder is written next to its destination and renamed at the end.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import isfinite, prod
from pathlib import Path
from threading import Event

import torch
from torch import Tensor

from data.format.printable import count_of
from finetune.adapters.merge_blocks import Lane, Realised, blocks, factors, intended_square
from finetune.adapters.merge_fp8 import Piece, Quantised, copied_pieces, quantised_pieces, typed_config
from finetune.adapters.merge_plan import MergePlan, OutFile, check_room, jobs_for
from finetune.adapters.provenance import parent_line, versions
from finetune.architecture.shapes import Shape, is_expert_stack
from finetune.architecture.yarn import both_spellings, extended_config
from finetune.files.atomic import whole_folder, write_file
from finetune.files.fp8 import BLOCK as SIDE
from finetune.files.hubconfig import config_text, to_hub_spelling
from finetune.files.jsonblock import load_json
from finetune.files.layouts import HUB_METADATA
from finetune.files.tensorfile import FP8, ReservedFile, raw_bytes, reserve, torch_type
from finetune.files.writer import CHECKSUMS, INDEX, REPORT, index_text


class _Stopped(Exception):
    """Another file failed, and its error is the one to report."""


@dataclass(frozen=True, kw_only=True)
class Merged:
    """The result of a finished merge."""

    folder: Path
    intended: int
    applied: int
    changes: Mapping[str, Realised]
    full: tuple[str, ...]
    quantised: Mapping[str, Quantised] = field(default_factory=dict)
    """Tensors that were quantised; those that an fp8 base has and the adapter leaves as they are, are not."""

    @property
    def lost(self) -> list[str]:
        """Tensors whose change was lost completely in rounding."""
        return [name for name, change in self.changes.items() if change.lost]

    def lines(self, worst: int = 5) -> list[str]:
        """Return the result as lines for people; the tensors whose changes lost most come first."""
        lines = [f"applied  {self.applied} of {self.intended} intended changes; {len(self.full)} tensors replaced"]
        rounded = {name: change for name, change in self.changes.items() if name not in self.quantised}
        order = sorted(rounded.items(), key=lambda item: -item[1].error)
        total = sum(change.intended_square for change in rounded.values())
        if self.quantised:
            weights = sum(loss.weight_square for loss in self.quantised.values())
            apart = sum(loss.error_square for loss in self.quantised.values())
            name, loss = max(self.quantised.items(), key=lambda item: item[1].error)
            lines.append(
                f"fp8      {count_of(len(self.quantised), 'tensor')} quantised: the weights are "
                f"{(apart / weights) ** 0.5:.2%} off, at most {loss.error:.2%} in {name}"
            )
        if total:
            error = (sum(change.error_square for change in rounded.values()) / total) ** 0.5
            lines.append(f"rounding the realised change is {error:.2%} off the intended one overall; most in:")
        lines += [
            f"  {name}: {change.error:.2%} off, {change.unchanged / change.values:.1%} of the weights unchanged"
            for name, change in order[:worst]
        ]
        zero = [name for name, change in self.changes.items() if not change.intended_square]
        if zero:
            lines.append(f"zero     {len(zero)} of the changes are zero in the adapter itself, first {zero[0]}")
        if self.lost:
            lines.append(f"LOST     {len(self.lost)} of the changes were lost in rounding, first {self.lost[0]}")
        return lines


@dataclass(kw_only=True)
class _Work:
    """State that the threads share. Each thread writes only the entries of its own tensors and files."""

    plan: MergePlan
    beside: Path
    stop: Event = field(default_factory=Event)
    changes: dict[str, Realised] = field(default_factory=dict)
    full: list[str] = field(default_factory=list)
    quantised: dict[str, Quantised] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    def loss(self, name: str) -> Quantised:
        """Return the record of a tensor that is being quantised."""
        return self.quantised.setdefault(name, Quantised())


def merge(plan: MergePlan, out: Path, *, jobs: int = 0, say: Callable[[str], None] = lambda text: None) -> Merged:
    """Write the merged folder. Raise, and leave nothing behind, unless every intended change was applied."""
    check_room(plan, out)
    threads = torch.get_num_threads()
    with whole_folder(out) as beside:
        work = _Work(plan=plan, beside=beside)
        torch.set_num_threads(1)  # files already run in parallel
        try:
            _write_files(work, jobs_for(len(plan.files), jobs), say)
        finally:
            torch.set_num_threads(threads)
        merged = Merged(
            folder=out,
            intended=plan.intended,
            applied=len(work.changes) + len(work.full),
            changes={name: work.changes[name] for name in plan.source.changes if name in work.changes},
            full=tuple(sorted(work.full)),
            quantised=dict(sorted(work.quantised.items())),
        )
        require_all(plan, merged)
        small = dict(plan.side_files) | {REPORT: _report(plan, merged)}
        if len(plan.files) > 1:
            small[INDEX] = index_text({file.name: file.tensors for file in plan.files})
        # The config comes last: without it, no program takes the folder for a model.
        config = extended_config(load_json(plan.base.folder / "config.json"), plan.context)
        config = typed_config(config, plan.dtype, plan.types, plan.base.shapes)
        small["config.json"] = config_text(both_spellings(to_hub_spelling(config))).encode()
        for name, content in small.items():
            data = content if isinstance(content, bytes) else content.read_bytes()
            work.digests[name] = hashlib.sha256(data).hexdigest()
            if name == "config.json":
                lines = "".join(f"{digest}  {file}\n" for file, digest in sorted(work.digests.items()))
                write_file(beside / CHECKSUMS, lines.encode())
            write_file(beside / name, data)
    return merged


def require_all(plan: MergePlan, merged: Merged) -> None:
    """Raise unless each intended change was applied to every value of its tensor."""
    skipped = [name for name in plan.source.full if name not in merged.full]
    for name, change in plan.source.changes.items():
        realised = merged.changes.get(name)
        if realised is None or realised.values != prod(change.shape):
            skipped.append(name)
    if skipped:
        raise ValueError(
            f"{len(skipped)} of {plan.intended} changes were not applied, first {skipped[0]}; nothing was written to "
            f"{merged.folder}"
        )


def _write_files(work: _Work, jobs: int, say: Callable[[str], None]) -> None:
    """Write all files, the largest first, so that no thread waits long for the last one."""
    order = sorted(work.plan.files, key=lambda file: -file.size)
    with ExitStack() as stack:
        # reserve everything first: a full disk or a quota shows up before anything is computed
        reserved = [stack.enter_context(reserve(work.beside / file.name, file.tensors, HUB_METADATA)) for file in order]
        pool = stack.enter_context(ThreadPoolExecutor(jobs))
        running = {pool.submit(_write_file, work, *pair): pair[0] for pair in zip(order, reserved, strict=True)}
        try:
            for future in as_completed(running):
                future.result()
                say(f"wrote    {running[future].name}")
        except BaseException:
            work.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _write_file(work: _Work, file: OutFile, out: ReservedFile) -> None:
    """Write one weight file from start to end, and hash it while writing."""
    widest = max(
        prod(shape[2:] if is_expert_stack(name) else shape[1:]) * (SIDE if kind == FP8 else 1)
        for name, (kind, shape) in file.tensors.items()
    )
    lane, digest = Lane(widest), hashlib.sha256(out.header)
    with out:
        for name, (kind, stored) in file.tensors.items():
            if name not in work.plan.base.shapes:  # scales, which follow their tensor's codes
                continue
            begin: Counter[str] = Counter()
            for key, piece in _pieces(work, name, kind, stored, lane):
                out.put_bytes(key, piece, begin[key])
                digest.update(piece)
                begin[key] += len(piece)
    work.digests[file.name] = digest.hexdigest()


def _pieces(work: _Work, name: str, kind: str, stored: Shape, lane: Lane) -> Iterator[Piece]:
    """Yield the bytes of a merged tensor in the order of the file; for fp8 these are codes, then scales."""
    plan = work.plan
    if name in plan.source.full:
        work.full.append(name)
        matrices = _replacement(plan, name)
        if kind != FP8:
            yield from ((name, raw_bytes(matrix.to(torch_type(kind)))) for matrix in matrices)
            return
        yield from quantised_pieces(name, (matrix.float() for matrix in matrices), work.loss(name))
    elif kind != FP8:
        yield from ((name, piece) for piece in _sum(work, name, stored, lane, kind))
    elif plan.base.dtypes[name] == FP8 and name not in plan.source.changes:
        yield from copied_pieces(plan.base, name, plan.base.shapes[name])
    else:
        yield from quantised_pieces(name, _sums(work, name, stored, lane), work.loss(name))


def _sums(work: _Work, name: str, stored: Shape, lane: Lane) -> Iterator[Tensor]:
    """Yield the float32 sum of a base tensor and the adapter's change, in blocks of complete scales."""
    change = work.plan.source.changes.get(name)
    left, right = factors(change) if change is not None else (None, None)
    for matrix, rows, block in blocks(work.plan.base, name, stored, lane, FP8):
        if work.stop.is_set():
            raise _Stopped
        if left is None or right is None:
            yield block.sum(None, None)
        else:
            yield block.sum(left[matrix, rows.start : rows.stop], right[matrix])
    if left is not None and right is not None:
        work.changes[name] = Realised(values=prod(stored), intended_square=intended_square(left, right))


def _sum(work: _Work, name: str, stored: Shape, lane: Lane, kind: str) -> Iterator[memoryview]:
    """Yield the sum of a base tensor and the adapter's change in the type of the file, block by block."""
    plan = work.plan
    change = plan.source.changes.get(name)
    left, right = factors(change) if change is not None else (None, None)
    realised = Realised()
    for matrix, rows, block in blocks(plan.base, name, stored, lane, kind):
        if work.stop.is_set():
            raise _Stopped
        if left is None or right is None:
            yield block.converted()
            continue
        block.add(left[matrix, rows.start : rows.stop], right[matrix], realised)
        yield block.out_raw
    if left is None or right is None:
        return
    realised.intended_square = intended_square(left, right)
    if not isfinite(realised.intended_square + realised.error_square):
        raise ValueError(
            f"{name}: base plus adapter is not finite; one of the two holds NaN or infinity, or the sum is too large "
            f"for its stored type. Nothing was written"
        )
    work.changes[name] = realised


def _replacement(plan: MergePlan, name: str) -> Iterator[Tensor]:
    """Yield a tensor that the adapter stores in full; an expert stack comes one matrix at a time, as in the file."""
    tensor = plan.source.read_full(name)
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name}: the adapter holds NaN or infinity for it. Nothing was written")
    yield from tensor.transpose(1, 2) if is_expert_stack(name) else (tensor,)


def _report(plan: MergePlan, merged: Merged) -> bytes:
    tensors = {
        name: {
            "intended_norm": realised.intended,
            "relative_error": realised.error,
            "unchanged": realised.unchanged / realised.values,
        }
        for name, realised in merged.changes.items()
        if name not in merged.quantised
    }
    content = {
        "base": str(plan.base.folder),
        "adapter": json.loads(parent_line(plan.source.folder)),
        "origin": plan.origin,
        "trained_with": plan.seen,
        "versions": json.loads(versions()),
        "intended": merged.intended,
        "applied": merged.applied,
        "replaced": list(merged.full),
        "changes": tensors,
    }
    if merged.quantised:
        content["quantised"] = {name: {"relative_error": loss.error} for name, loss in merged.quantised.items()}
    return (json.dumps(content, indent=1) + "\n").encode()

"""The figures of a step, computed from the shares of all ranks, which are exchanged once per step."""

import resource
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from data.stream.batch import Step, keys_of
from finetune.architecture.flops import FlopMeter, Work, batch_work
from finetune.ranks.collectives import gather_numbers
from moe.expert_load import StepLoad

WORK = ("tokens", "supervised", "squares", "patches", "frame_squares")
OWN = ("row_tokens", "images", "video_seconds", "seconds", "seconds_data", "memory_gb", "stop")
CACHE = ("shard_hits", "shard_waits", "shard_bytes")


@dataclass(frozen=True, kw_only=True)
class SourceSums:
    """The share of one source in a step."""

    samples: int = 0
    tokens: int = 0
    weight: float = 0.0
    """The sum of the loss weights of its tokens; the mean loss is the loss divided by this."""
    loss: float = 0.0
    """The sum over its tokens of weight x cross entropy."""

    def __add__(self, other: "SourceSums") -> "SourceSums":
        return SourceSums(
            samples=self.samples + other.samples,
            tokens=self.tokens + other.tokens,
            weight=self.weight + other.weight,
            loss=self.loss + other.loss,
        )


QUANTITIES = tuple(item.name for item in fields(SourceSums))


@dataclass(frozen=True, kw_only=True)
class Share:
    """One rank's part of a step."""

    work: Work
    row_tokens: int = 0  # of its packed rows, including padding; dummy rows do not count
    images: int = 0
    video_seconds: float = 0.0
    seconds: float = 0.0  # from the moment it asked for data to the end of the update
    seconds_data: float = 0.0  # the part of these that it waited for data
    memory_gb: float = 0.0  # the most it held so far
    stop: int = 0  # the number of the signal that asks it to stop; 0: none
    shard_hits: int = 0  # reads of remote shards that the cache had
    shard_waits: int = 0  # reads that waited until a shard was fetched
    shard_bytes: int = 0  # fetched from stores
    sources: Mapping[str, SourceSums] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The number of ranks, and the peak performance of the device of one rank."""

    world: int
    peak_flops: float | None  # of one device, in bfloat16; None: unknown, so there is no MFU


def share_of(
    step: Step, *, seconds: float, stop: int, sources: Iterable[str] = (), losses: Sequence[float] = ()
) -> Share:
    """Return this rank's share. It reads tensors on the host, so pass the step as it came from the stream.

    `sources` are all of the run's; `losses` are this rank's part of the loss of each of the step's samples.
    """
    # of the ranks that share a row, only one counts it: `counted_once` empties the steps of the others
    real = [batch for batch in step.batches if batch.keys] if step.tokens else []
    return Share(
        work=sum((batch_work(batch) for batch in real), Work()),
        row_tokens=sum(batch.input_ids.numel() for batch in real),
        images=step.images,
        video_seconds=step.video_seconds,
        seconds=seconds,
        seconds_data=step.wait_seconds,
        memory_gb=_memory_gb(),
        stop=stop,
        shard_hits=step.reads.hits,
        shard_waits=step.reads.waits,
        shard_bytes=step.reads.bytes,
        sources=_by_source(step, sources, losses),
    )


def _by_source(step: Step, sources: Iterable[str], losses: Sequence[float]) -> dict[str, SourceSums]:
    """Return the sums of each source on this rank; if ranks share a row, each adds a part of the loss."""
    sums = {name: SourceSums() for name in sources}
    for key, loss in zip(keys_of(step.batches), losses, strict=False):  # there are no losses if nothing is supervised
        sums[key.partition("/")[0]] += SourceSums(loss=loss)
    for batch in step.batches if step.tokens else ():
        ids_T, weights_T = batch.sample_ids[0].long() + 1, batch.loss_weights[0].double()  # the first bin: padding
        tokens = torch.bincount(ids_T).tolist()
        weights = torch.bincount(ids_T, weights_T).tolist()
        for number, key in enumerate(batch.keys, start=1):
            sums[key.partition("/")[0]] += SourceSums(samples=1, tokens=tokens[number], weight=weights[number])
    return sums


def gather_shares(mine: Share, device: torch.device) -> list[Share]:
    """Return the shares of all ranks, the same list on each; every rank must call this."""
    flat = [getattr(mine.work, name) for name in WORK] + [getattr(mine, name) for name in (*OWN, *CACHE)]
    flat += [getattr(sums, name) for sums in mine.sources.values() for name in QUANTITIES]
    shares = []
    for numbers in gather_numbers(flat, device):
        work = Work(**{name: int(number) for name, number in zip(WORK, numbers, strict=False)})
        own: dict[str, Any] = dict(zip((*OWN, *CACHE), numbers[len(WORK) :], strict=False))
        own |= {name: int(own[name]) for name in ("row_tokens", "images", "stop", *CACHE)}
        rest = iter(numbers[len(WORK) + len(OWN) + len(CACHE) :])
        sources = {
            name: SourceSums(samples=int(next(rest)), tokens=int(next(rest)), weight=next(rest), loss=next(rest))
            for name in mine.sources
        }
        shares.append(Share(work=work, **own, sources=sources))
    return shares


def figures(shares: Sequence[Share], meter: FlopMeter, ranks: Ranks) -> dict[str, Any]:
    """Return a step's figures over all ranks: the sums of the work, and the seconds of the slowest rank.

    Tokens per second count useful tokens. FLOP/s are per device, and count only operations that this training needs.
    """
    work = sum((share.work for share in shares), Work())
    seconds = max(share.seconds for share in shares)
    rate = meter.model(work) / seconds / ranks.world
    return {
        "tokens": sum(share.row_tokens for share in shares),
        "tokens_nonpad": work.tokens,
        "tokens_supervised": work.supervised,
        "images": sum(share.images for share in shares),
        "video_seconds": sum(share.video_seconds for share in shares),
        "seconds": seconds,
        "seconds_data": max(share.seconds_data for share in shares),
        "tokens_per_second": work.tokens / seconds,
        "tflops_model": rate / 1e12,
        "mfu": rate / ranks.peak_flops if ranks.peak_flops else None,
        "memory_gb": max(share.memory_gb for share in shares),
        "sources": source_figures(shares),
        **_cache_figures(shares),
    }


def _cache_figures(shares: Sequence[Share]) -> dict[str, int]:
    """Return what the cache of remote shards did in a step; nothing where all shards are on disks."""
    sums = {name: sum(getattr(share, name) for share in shares) for name in CACHE}
    return sums if any(sums.values()) else {}


def source_figures(shares: Sequence[Share]) -> dict[str, dict[str, Any]]:
    """Return a step's figures by source, for sources with samples; the loss is a mean over their tokens."""
    sums = {
        name: sum((share.sources[name] for share in shares), SourceSums())
        for name in (shares[0].sources if shares else ())
    }
    return {
        name: {
            "samples": of_source.samples,
            "tokens": of_source.tokens,
            "weight": of_source.weight,
            "loss": of_source.loss / of_source.weight if of_source.weight else None,
        }
        for name, of_source in sums.items()
        if of_source.samples
    }


def load_figures(load: StepLoad | None) -> Mapping[str, Any]:
    """Return the figures of the experts' load; all are None if the base is dense."""
    if load is None:
        return dict.fromkeys(
            ("expert_load_max_over_mean", "expert_load_entropy", "experts_dead", "router_agreement"), None
        )
    return {
        "expert_load_max_over_mean": load.expert_load_max_over_mean,
        "expert_load_entropy": load.expert_load_entropy,
        "experts_dead": load.experts_dead,
        "router_agreement": load.router_agreement,
    }


def _memory_gb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB

"""Our run on ranks, and the same training as a plain loop in one process: transformers, stock PEFT, torch's AdamW.

The loop takes one sample at a time, with transformers' own positions and masks: no packing, no ranks, no engine.
"""

import hashlib
import json
from collections.abc import Iterator
from math import cos, pi
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

import finetune.train as loop
import finetune.training.setup as setup
from data.render.sample import Renderer
from data.render.vision import normalise, read_spec
from data.stream.batch import Batch
from finetune.adapters.write_trained import write_adapter
from finetune.files.basefiles import open_base
from finetune.model.build import build
from finetune.model.empty import ModelOptions
from finetune.model.lora import with_adapters
from finetune.model.weights import load_weights
from finetune.ranks.engine import gathered
from finetune.settings.recipes import load_recipe
from finetune.settings.stages import run_stages
from finetune.training.steps import RunData

STEPS, WARMUP, LR, EXPERTS_LR, CLIP = 8, 2, 1e-3, 6e-4, 0.5
EVERYTHING = [
    "adapters.attention.mode=lora",
    "adapters.experts.mode=lora",
    f"adapters.experts.lr={EXPERTS_LR}",
    "adapters.vision_blocks.mode=lora",
    "adapters.merger.mode=full",
    "adapters.deepstack_mergers.mode=lora",
    "adapters.router.mode=full",
]
COMMON = [
    "model.path=base",
    "model.dtype=float32",
    "data.sources.general.path=shards",
    "data.workers=0",
    "data.remainder=keep",
    "data.tokens_per_pack=384",
    "data.image.min_tokens=4",
    "data.image.max_tokens=16",
    "data.video.max_tokens=64",
    f"optim.lr={LR}",
    "optim.eps=1e-6",
    f"optim.clip_norm={CLIP}",
    "optim.weight_decay=0.1",
    "moe.balance=off",
    f"schedule.warmup_steps={WARMUP}",
    "schedule.shape=cosine",
    "checkpoint.every_steps=0",
]


def runs(rank: int, world: int, jobs: dict[str, list[str]]) -> dict[str, Any]:
    """Run our jobs in turn in these processes; frozen tensors are hashed at the start and at the end."""
    hashes: dict[str, Any] = {}
    initialize, write = setup.initialize, loop.write_learned
    for name, words in jobs.items():

        def start(packed: Any, options: Any, groups: Any, name: str = name) -> Any:
            trained = {id(p) for group in groups for p in group.parameters}
            hashes[name] = {"before": _frozen(packed.model, trained), "trained": trained}
            return initialize(packed, options, groups)

        def end(empty: Any, *rest: Any, name: str = name) -> None:
            hashes[name]["after"] = _frozen(empty.module, hashes[name].pop("trained"))
            write(empty, *rest)

        setup.initialize, loop.write_learned = start, end
        code = loop.main(["tiny-cpu", f"run.name={name}", f"schedule.steps={STEPS}", *COMMON, *words])
        assert code == 0, (name, code)
    return hashes


def _frozen(module: nn.Module, trained: set[int]) -> dict[str, str]:
    """Return a hash of all bits of each tensor that must not change; every rank must call this."""
    found = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if id(tensor) in trained or "lora" in name:
            continue
        with gathered(tensor):
            found[name] = hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    return found


def write_start(place: Path) -> None:
    """Write an initial adapter whose low-rank factors are all non-zero."""
    config, problems = load_recipe("tiny-cpu", [*COMMON, *EVERYTHING])
    assert not problems
    empty = build(place / "base", with_adapters(config.adapters, ModelOptions(dtype=torch.float32)))
    load_weights(empty, open_base(place / "base", empty.expected))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name in empty.trained:
            if "lora_B" in name:
                parameter = empty.module.get_parameter(name)
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    write_adapter(empty, place / "start", base=str(place / "base"))


def plain_loop(place: Path, packs: int, out: Path) -> list[float]:
    """Train the initial adapter for STEPS steps and save it; return the losses."""
    config, problems = load_recipe(
        "tiny-cpu",
        [
            *COMMON,
            *EVERYTHING,
            f"schedule.steps={STEPS}",
            f"data.packs_per_step={packs}",
            f"data.sources.general.path={place}/shards",
        ],
    )
    assert not problems
    base = AutoModelForImageTextToText.from_pretrained(place / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, place / "start", is_trainable=True)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    experts = [p for name, p in named.items() if ".experts." in name]
    others = [p for name, p in named.items() if ".experts." not in name and p.ndim > 1]
    vectors = [p for name, p in named.items() if p.ndim == 1]
    groups = [
        {"params": experts, "peak": EXPERTS_LR, "weight_decay": 0.1},
        {"params": others, "peak": LR, "weight_decay": 0.1},
        {"params": vectors, "peak": LR, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-6)
    renderer = Renderer(place / "base", image=config.data.image, video=config.data.video, chat=config.data.chat)
    data = RunData(run_stages(config), renderer, seed=config.run.seed, groups={1: None})
    losses = []
    for at in range(STEPS):
        step = data.take(at)
        total = sum(float(batch.loss_weights.sum()) for batch in step.batches)
        loss = torch.zeros(())
        for batch in step.batches:
            for sample_loss in alone(model, batch, place / "base"):
                (sample_loss / total).backward()
                loss += sample_loss.detach() / total
        losses.append(loss.item())
        nn.utils.clip_grad_norm_(list(named.values()), CLIP)
        done = (at - WARMUP) / (STEPS - WARMUP - 1)
        share = (at + 1) / WARMUP if at < WARMUP else (1 + cos(pi * done)) / 2
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)
    return losses


def alone(model: Any, batch: Batch, base: Path) -> Iterator[Tensor]:
    """Run each sample of a row alone in transformers' form; yield the weighted sum of its losses."""
    config, spec = model.config, read_spec(base)
    taken = {"image": 0, "video": 0}
    cuts = batch.cu_seq_lens.tolist()
    for first, last in zip(cuts[: len(batch.keys)], cuts[1:], strict=False):
        ids, weights = batch.input_ids[:, first:last], batch.loss_weights[0, first:last]
        kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        seen = {}
        for number, kind in enumerate(("image", "video"), 1):
            grids, suffix = getattr(batch, f"{kind}_grids"), "" if kind == "image" else "_videos"
            count, begin = int((kinds == number).sum()), taken[kind]
            taken[kind] += count
            if count:
                ends = (grids.prod(1) // spec.merge**2).cumsum(0)
                rows = slice(spec.merge**2 * begin, spec.merge**2 * (begin + count))
                seen[f"pixel_values{suffix}"] = normalise(getattr(batch, f"{kind}_patches")[rows], spec=spec)
                seen[f"{kind}_grid_thw"] = grids[(ends > begin) & (ends <= begin + count)]
        logits = model(input_ids=ids, mm_token_type_ids=kinds, use_cache=False, **seen).logits[0, :-1]
        yield (nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none") * weights[1:]).sum()


def losses_of(place: Path, name: str) -> list[float]:
    lines = (place / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def apart(place: Path, name: str, reference: Path) -> tuple[float, str]:
    """Return the largest difference of a tensor in two adapters, relative to its largest value, and its name."""
    ours = load_file(place / "runs" / name / "adapter" / "adapter_model.safetensors")
    wanted = load_file(reference / "adapter_model.safetensors")
    assert set(ours) == set(wanted)
    return max((float((ours[n] - wanted[n]).abs().max() / wanted[n].abs().max()), n) for n in wanted)

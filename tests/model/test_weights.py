"""Loading: after streaming to any layout, losses and gradients equal those of transformers' own `from_pretrained`."""

from pathlib import Path
from typing import Any

import fp8_files as fp8
import pytest
import torch
from base_folders import dense_model, write_base
from ranks import RankError, run_ranks
from safetensors.torch import save_file
from tiny_moe import ROWS, media_batch, text_model, token_count, token_loss, vl_model
from torch import Tensor
from transformers import AutoModelForImageTextToText

from finetune.architecture.rank_shares import rank_shares
from finetune.files.basefiles import open_base
from finetune.files.layouts import single_expert
from finetune.model.build import build
from finetune.model.empty import ModelOptions
from finetune.model.gather import save_model
from finetune.model.weights import check_rows, load_weights
from moe.experts import ExpertLora
from moe.parallel import LayerOptions
from moe.router import RouterOptions

EVERYTHING = (
    *("embeddings", "head", "attention", "norms", "vision_blocks"),
    *("patch_embed", "pos_embed", "merger", "deepstack_mergers"),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write a MoE and a dense base in the hub's layout, and next to each transformers' loss and gradients."""
    made = {}
    models = {"moe": vl_model(layers=3), "dense": dense_model(), "fp8-moe": vl_model(hidden=264, intermediate=72)}
    for name, model in models.items():
        size = 10**9 if name == "fp8-moe" else 100_000
        plain = made[name] = write_base(model, tmp_path_factory.mktemp("base") / name, shard_bytes=size)
        if name == "fp8-moe":
            plain = made[name].with_name("dequantised")
            fp8.quantise_folder(made[name], plain)
        reference = AutoModelForImageTextToText.from_pretrained(plain, dtype=torch.float32)
        data = media_batch(slice(0, ROWS))
        loss = token_loss(reference(**data).logits, data["input_ids"]) / token_count(data["input_ids"])
        loss.backward()
        gradients = {key: parameter.grad for key, parameter in reference.named_parameters()}
        torch.save({"loss": loss.item(), "gradients": gradients}, made[name].with_suffix(".reference"))
    return made


def session(rank: int, world: int, folder: Path, cases: list[tuple[int, bool]]) -> list[dict[str, Any]]:
    """Load and run one backward per (ep, resident); return the worst relative errors against the reference."""
    from deepspeed.utils import safe_get_full_grad

    from finetune.ranks.engine import EngineOptions, backward, engine_config, initialize, start_distributed

    start_distributed()
    reference = torch.load(folder.with_suffix(".reference"))
    results = []
    for ep, resident in cases:
        moe = "moe" in folder.name
        layer = _full() if moe else LayerOptions()
        train = EVERYTHING if moe else (*EVERYTHING, "mlp")
        if resident:
            train = ("attention",)
            layer = LayerOptions(experts="lora", lora=ExpertLora(r=4, alpha=8)) if moe else layer
        options = ModelOptions(ep_size=ep, layer=layer, train=train, resident=resident, dtype=torch.float32)
        empty = build(folder, options)
        files = open_base(folder, empty.expected)
        engine_options = EngineOptions(dtype="float32", micro_batches_per_step=ROWS // world, clip_norm=0.0)
        report = load_weights(empty, files, engine_config=engine_config(engine_options))
        own = [b for n, b in empty.module.named_buffers() if "inv_freq" in n or "base_weight" in n]
        tables = sum(buffer.numel() * buffer.element_size() for buffer in own)
        held = report.bytes_held - tables
        engine = initialize(empty.module, engine_options)
        total, loss = token_count(media_batch(slice(0, ROWS))["input_ids"]), 0.0
        for row in range(rank * ROWS // world, (rank + 1) * ROWS // world):
            data = media_batch(slice(row, row + 1))
            part = token_loss(engine(**data, use_cache=False).logits, data["input_ids"])
            backward(engine, part, total)
            loss += part.item() / total
        worst = {}
        for name, parameter in engine.module.named_parameters():
            wanted = reference["gradients"].get(empty.canonical(name))
            found = safe_get_full_grad(parameter)
            if wanted is None or found is None:
                assert "lora_" in name or not parameter.requires_grad, name
                continue
            if name.endswith((".experts.gate_up", ".experts.down")):
                local = found.shape[0]
                wanted = wanted[(rank % ep) * local : (rank % ep + 1) * local]
            worst[name] = ((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12)).item()
        results.append({"loss": loss, "worst": worst, "read": report.bytes_read, "held": held})
    return results


def _check(folder: Path, world: int, cases: list[tuple[int, bool]]) -> None:
    reference = torch.load(folder.with_suffix(".reference"))
    ranks = run_ranks(session, world, folder, cases)
    shapes = {name: tuple(gradient.shape) for name, gradient in reference["gradients"].items()}
    files = open_base(folder)
    on_disk = sum(tensor.size for tensor in (*files.stored.values(), *files.scales.values()))
    for at, (ep, resident) in enumerate(cases):
        found = [rank[at] for rank in ranks]
        assert sum(result["loss"] for result in found) == pytest.approx(reference["loss"], rel=1e-5)
        assert sum(result["read"] for result in found) == on_disk, "each byte is read once"
        if not resident and not files.scales:
            shares = rank_shares(shapes, world_size=world, ep_size=ep, itemsize=4, resident=False)
            assert [(r["read"], r["held"]) for r in found] == [(s.read, s.kept) for s in shares]
        for result in found:
            name, error = max(result["worst"].items(), key=lambda item: item[1])
            assert error < 1e-5, f"ep {ep}, resident {resident}: {name}"
            assert resident or len(result["worst"]) == len(reference["gradients"])


WORLDS = [
    (1, [(1, False), (1, True)]),
    (2, [(2, False), (2, True)]),
    (4, [(2, False), (2, True), (4, True), (4, False)]),
]


@pytest.mark.parametrize(("world", "cases"), WORLDS)
def test_moe_loads_exactly_at_any_layout(folders: dict[str, Path], world: int, cases: list[tuple[int, bool]]) -> None:
    _check(folders["moe"], world, cases)


@pytest.mark.parametrize("world", [1, 2])
def test_an_fp8_base_trains_like_the_dequantised_one(folders: dict[str, Path], world: int) -> None:
    """Its sizes are no multiples of 128, and gate and up share a block."""
    _check(folders["fp8-moe"], world, [(world, False), (world, True)])


def test_dense_loads_exactly(folders: dict[str, Path]) -> None:
    _check(folders["dense"], 2, [(1, False), (1, True)])


def tune_and_write(rank: int, world: int, base: Path, out: Path, ep: int) -> Tensor:
    """Train everything for three steps, write the model to a folder, and return the logits after training."""
    from finetune.ranks.engine import EngineOptions, backward, engine_config, initialize, start_distributed

    start_distributed()
    options = ModelOptions(ep_size=ep, layer=_full(), train=EVERYTHING, resident=False, dtype=torch.float32)
    empty = build(base, options)
    engine_options = EngineOptions(dtype="float32", lr=1e-2)
    load_weights(empty, open_base(base, empty.expected), engine_config=engine_config(engine_options))
    engine = initialize(empty.module, engine_options)
    data = media_batch(slice(rank, rank + 1))
    for _ in range(3):
        loss = token_loss(engine(**data, use_cache=False).logits, data["input_ids"])
        backward(engine, loss, world * token_count(data["input_ids"]))
        engine.step()
    engine.eval()
    with torch.no_grad():
        logits = engine(**media_batch(slice(0, 1)), use_cache=False).logits
    save_model(empty, out, base)
    return logits


def _full() -> LayerOptions:
    return LayerOptions(experts="full", router=RouterOptions(mode="full"), resident=False)


@pytest.mark.parametrize(("world", "ep"), [(2, 2), (4, 2)])
def test_full_tuning_writes_a_model_that_transformers_loads(
    folders: dict[str, Path], tmp_path: Path, world: int, ep: int
) -> None:
    logits = run_ranks(tune_and_write, world, folders["moe"], tmp_path / "tuned", ep)
    tuned = AutoModelForImageTextToText.from_pretrained(tmp_path / "tuned", dtype=torch.float32)
    base = AutoModelForImageTextToText.from_pretrained(folders["moe"], dtype=torch.float32)
    with torch.no_grad():
        found, before = (model(**media_batch(slice(0, 1)), use_cache=False).logits for model in (tuned, base))
    assert (found - before).abs().max() > 1e-2, "three steps change the model"
    for own in logits:
        assert (own - found).abs().max() <= 1e-5 * found.abs().max()
    changed = dict(tuned.named_parameters())
    assert [name for name, old in base.named_parameters() if torch.equal(old, changed[name])] == []


def write_untouched(rank: int, world: int, base: Path, out: Path) -> None:
    from finetune.ranks.engine import EngineOptions, engine_config, start_distributed

    start_distributed()
    empty = build(base, ModelOptions(ep_size=2, layer=LayerOptions(resident=True), dtype=torch.float32))
    load_weights(empty, open_base(base, empty.expected), engine_config=engine_config(EngineOptions(dtype="float32")))
    save_model(empty, out, base)


def test_weights_that_were_not_trained_are_written_unchanged(folders: dict[str, Path], tmp_path: Path) -> None:
    run_ranks(write_untouched, 2, folders["moe"], tmp_path / "copy")
    before, after = open_base(folders["moe"]), open_base(tmp_path / "copy")
    assert before.shapes == after.shapes
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.shapes)


@pytest.mark.parametrize("layout", ["per_expert", "memory"])
def test_a_text_only_moe_loads_from_either_of_its_layouts(tmp_path: Path, layout: str) -> None:
    """The hub's text models hold one matrix per expert; transformers 5 saves them fused, as it holds them in memory."""
    model = text_model().eval()
    tensors = {}
    for name, tensor in model.state_dict().items():
        if layout == "per_expert" and ".mlp.experts." in name:
            for expert in range(tensor.shape[0]):
                parts = [part for part, _ in single_expert(name, tuple(tensor.shape), expert)]
                tensors |= dict(zip(parts, (t.clone() for t in tensor[expert].chunk(len(parts))), strict=True))
        else:
            tensors[name] = tensor
    save_file(tensors, tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    empty = build(tmp_path, ModelOptions(dtype=torch.float32))
    files = open_base(tmp_path, empty.expected)
    report = load_weights(empty, files)
    assert (files.layout, report.bytes_read) == (layout, sum(t.numel() * 4 for t in tensors.values()))
    ids = torch.randint(0, 160, (2, 11), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found, wanted = empty.module.eval()(ids).logits, model(ids).logits
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_rotary_tables_stay_float32_and_weights_get_the_models_dtype(folders: dict[str, Path]) -> None:
    empty = build(folders["moe"], ModelOptions(dtype=torch.bfloat16))
    load_weights(empty, open_base(folders["moe"], empty.expected))
    kinds = {name: buffer.dtype for name, buffer in empty.module.named_buffers()}
    tables = {name for name in kinds if name.endswith("inv_freq")}
    assert len(tables) == 4
    assert {kinds[name] for name in tables} == {torch.float32}
    assert {kind for name, kind in kinds.items() if name not in tables} == {torch.bfloat16}


def test_a_wrong_layout_is_found_by_comparing_rows(folders: dict[str, Path]) -> None:
    empty = build(folders["moe"], ModelOptions(dtype=torch.float32))
    files = open_base(folders["moe"], empty.expected)
    load_weights(empty, files)
    check_rows(empty, files)
    with torch.no_grad():
        empty.module.model.language_model.layers[-1].mlp.experts.down[-1, -1, 3] += 1e-3
    with pytest.raises(ValueError, match=r"layers.2.mlp.*down_proj, expert 11: row 47 .* by up to 0.001.*model.layout"):
        check_rows(empty, files)


def meets_a_damaged_file(rank: int, world: int, folder: Path) -> None:
    from finetune.ranks.engine import EngineOptions, engine_config, start_distributed

    start_distributed()
    empty = build(folder, ModelOptions(ep_size=2, dtype=torch.float32))
    files = open_base(folder, empty.expected)
    torch.distributed.barrier()  # both have opened the intact file
    if rank == 0:
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:200_000])
    torch.distributed.barrier()
    load_weights(empty, files, engine_config=engine_config(EngineOptions(dtype="float32")))


def test_a_file_cut_off_while_it_is_read_ends_all_ranks_with_its_name(tmp_path: Path) -> None:
    write_base(vl_model(), tmp_path / "base", shard_bytes=10**9)
    with pytest.raises(RankError, match=r"model.safetensors ends inside .*: it was cut off while it was being read"):
        run_ranks(meets_a_damaged_file, 2, tmp_path / "base")


def test_models_that_cannot_be_built_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"parts to train: attn not in this model; it has patch_embed, pos_embed"):
        build(folders["moe"], ModelOptions(train=("attn",)))
    with pytest.raises(ValueError, match=r"parallel.ep: 2, but qwen3_vl in .*dense has no experts. Set parallel.ep=1"):
        build(folders["dense"], ModelOptions(ep_size=2))
    tied = write_base(dense_model(tied=True), tmp_path / "tied")
    for part in ("head", "embeddings"):
        with pytest.raises(ValueError, match=r"ties its head and its embedding .* would change both"):
            build(tied, ModelOptions(train=(part,)))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"must be one of qwen3_vl_moe, qwen3_moe, qwen3_vl, qwen3, got 'llama'"):
        build(tmp_path, ModelOptions())


def test_a_tied_head_is_absent_and_stays_tied(tmp_path: Path) -> None:
    base = write_base(dense_model(tied=True), tmp_path / "tied")
    for resident in (True, False):
        empty = build(base, ModelOptions(dtype=torch.float32, resident=resident))
        load_weights(empty, open_base(base, empty.expected))
        reference = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
        data = media_batch(slice(0, 2))
        with torch.no_grad():
            found, wanted = (m(**data, use_cache=False).logits for m in (empty.module.eval(), reference))
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        assert empty.module.lm_head.weight is empty.module.model.language_model.embed_tokens.weight

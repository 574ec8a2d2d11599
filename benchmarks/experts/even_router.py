"""Set the router weights of a tiny base so that rows like the given one spread evenly over the experts."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3VLMoeForConditionalGeneration

from data.render.vision import read_spec
from data.stream.batch import Batch
from finetune.files.hubconfig import read_family
from finetune.model.forward import PackedModel
from finetune.model.varlen import register


@torch.no_grad()
def spread_evenly(folder: Path, batch: Batch) -> list[float]:
    """Set each layer's router during one forward; return, by layer, the busiest expert's rows over the mean.

    Hidden states share most of their direction, so that a random router sends most tokens to a few experts. These
    routers are orthogonal to the mean of text and to the mean of images, and use whitened directions.
    """
    register()
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="segments"
    )
    base, generator = read_family(folder), torch.Generator().manual_seed(0)
    routers: dict[str, Tensor] = {}
    busiest: list[float] = []
    seen_T = (batch.input_ids[0] == base.image_token_id) | (batch.input_ids[0] == base.video_token_id)

    def choose(gate: Any, arguments: tuple[Tensor]) -> None:
        x_TD = arguments[0].reshape(len(seen_T), -1).double()
        means_GD = torch.stack([x_TD[part].mean(0) for part in (seen_T, ~seen_T) if part.any()])
        own_TD = torch.cat([x_TD[part] - x_TD[part].mean(0) for part in (seen_T, ~seen_T) if part.any()])
        values_D, vectors_DD = torch.linalg.eigh(own_TD.T @ own_TD / len(own_TD))
        white_DD = vectors_DD * values_D.clamp(min=1e-3 * values_D.max()).rsqrt()
        directions = torch.randn(white_DD.shape[1], len(gate.weight), generator=generator, dtype=torch.float64)
        across = torch.linalg.qr(torch.cat([white_DD.T @ means_GD.T, directions], dim=1)).Q[:, len(means_GD) :]
        gate.weight.copy_((white_DD @ across).T)
        load_E = (x_TD.float() @ gate.weight.T).topk(gate.top_k).indices.flatten().bincount(minlength=len(gate.weight))
        busiest.append(float(load_E.max() / load_E.double().mean()))

    for name, module in model.named_modules():
        if name.endswith(".mlp.gate"):
            routers[f"{name}.weight"] = module.weight
            module.register_forward_pre_hook(choose)
    packed = PackedModel(model, spec=read_spec(folder))
    packed.hidden(packed.send(batch, torch.device("cpu")).arrived())
    file = folder / "model.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert routers.keys() <= tensors.keys()
    save_file(tensors | {name: weight.contiguous() for name, weight in routers.items()}, file, metadata=metadata)
    return busiest

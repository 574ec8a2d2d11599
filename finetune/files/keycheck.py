"""Checks that weight files hold exactly the model that config.json describes; the error names the likely causes."""

from __future__ import annotations

from collections.abc import Mapping

from finetune.architecture.shapes import EMBEDDING, HEAD, VISUAL, Shape, is_expert_stack
from finetune.files.fp8 import FORM, SCALE, scale_shape
from finetune.files.layouts import Layout, stored_shape, stored_shapes
from finetune.files.tensorfile import FLOAT_TYPES, FP8, Stored
from finetune.ranks.log import listed


def check_keys(
    stored: Mapping[str, Stored], shapes: Mapping[str, Shape], layout: Layout, *, where: str, fp8: bool = False
) -> None:
    """Raise ValueError unless the files hold every tensor of these canonical shapes in this layout, and no others.

    A tied head must be absent: it is not among the shapes. With `fp8`, matrices may be codes.
    """
    expected = stored_shapes(shapes, layout)
    missing = [name for name in expected if name not in stored]
    unexpected = [name for name in stored if name not in expected]
    misshaped = [name for name, shape in expected.items() if name in stored and stored[name].shape != shape]
    types = (*FLOAT_TYPES, FP8) if fp8 else FLOAT_TYPES
    unreadable = [name for name in expected if name in stored and stored[name].dtype not in types]
    mixed = _mixed_types(stored, expected)
    if not (missing or unexpected or misshaped or unreadable or mixed):
        return
    lines = [f"{where} does not hold the model that its config.json describes (layout {layout}):"]
    if missing:
        lines.append(f"missing keys ({len(missing)} of {len(expected)}): {listed(missing)}")
    if unexpected:
        lines.append(f"unexpected keys ({len(unexpected)}): {listed(unexpected)}")
    if misshaped:
        pairs = [f"{name} is {list(stored[name].shape)}, not {list(expected[name])}" for name in misshaped]
        lines.append(f"keys with another shape ({len(misshaped)}): {listed(pairs)}")
    if unreadable:
        pairs = [f"{name} is {stored[name].dtype}" for name in unreadable]
        lines.append(f"keys with a type other than {', '.join(types)} ({len(unreadable)}): {listed(pairs)}")
    if mixed:
        lines.append(f"expert stacks of several types ({len(mixed)}): {listed(mixed)}")
    shapes_in_files = {name: tensor.shape for name, tensor in stored.items()}
    causes = _causes(missing, unexpected, misshaped, shapes_in_files, expected)
    if unreadable:
        causes.append("the checkpoint is quantised, but its config.json has no quantization_config that says so")
    lines += [f"Likely cause: {cause}." for cause in causes]
    raise ValueError("\n  ".join(lines))


def check_scales(stored: Mapping[str, Stored], scales: Mapping[str, Stored], *, where: str) -> None:
    """Raise ValueError unless every fp8 tensor has scales of its shape in blocks, and every scale has its tensor."""
    codes = {key: tensor for key, tensor in stored.items() if tensor.dtype == FP8}
    missing = [key for key in codes if key not in scales]
    stray = [key + SCALE for key in scales if key not in codes]
    pairs = [(scales[key], tensor.shape) for key, tensor in codes.items() if key in scales]
    wrong = [
        f"{scale.name} is {scale.dtype} {list(scale.shape)} for {list(shape)}"
        for scale, shape in pairs
        if len(shape) < 2 or scale.shape != scale_shape(shape) or scale.dtype not in FLOAT_TYPES
    ]
    lines = []
    if not codes:
        lines.append(f"config.json says that it is {FORM}, but no tensor has the type {FP8}")
    if missing:
        lines.append(f"fp8 tensors without scales ({len(missing)}): {listed([key + SCALE for key in missing])} missing")
    if stray:
        lines.append(f"scales without an fp8 tensor ({len(stray)}): {listed(stray)}")
    if wrong:
        lines.append(f"scales that are not one float for each block ({len(wrong)}): {listed(wrong)}")
    if lines:
        text = "\n  ".join(lines)
        raise ValueError(f"{where} is no complete fp8 folder:\n  {text}\n  Fetch it again, or use the original one")


def _mixed_types(stored: Mapping[str, Stored], expected: Mapping[str, Shape]) -> list[str]:
    """Return per-expert keys of one stack that are stored in several types: stacking would silently round some."""
    types: dict[str, set[str]] = {}
    for name in expected:
        stem, experts, rest = name.partition(".mlp.experts.")
        if experts and name in stored:
            stack = "down" if rest.endswith("down_proj.weight") else "gate_up"
            types.setdefault(f"{stem}{experts}{stack}" if rest[0].isdigit() else name, set()).add(stored[name].dtype)
    return [f"{stack} ({', '.join(sorted(kinds))})" for stack, kinds in types.items() if len(kinds) > 1]


def _causes(
    missing: list[str],
    unexpected: list[str],
    misshaped: list[str],
    shapes: Mapping[str, Shape],
    expected: Mapping[str, Shape],
) -> list[str]:
    causes = _naming_causes(missing, unexpected, expected)
    if HEAD in unexpected and HEAD not in expected:
        causes.append(
            "config.json ties the head to the embedding (tie_word_embeddings is true), but the files have a separate "
            "head, which would be dropped; set it to false if the head was trained separately"
        )
    if missing == [HEAD]:
        causes.append(
            "the head in the files is tied to the embedding, but config.json sets tie_word_embeddings to false"
        )
    if missing and all(name.startswith(VISUAL) for name in missing):
        causes.append("these are the weights of a text model, without a vision tower")
    if misshaped and all(is_expert_stack(name) for name in misshaped) and _swapped(misshaped, shapes, expected):
        causes.append(
            "the experts are stored in the other fused layout; leave model.layout at auto, or set it to hub (published "
            "files, transformers 4) or memory (saved by transformers 5)"
        )
    elif misshaped and set(misshaped) <= {EMBEDDING, HEAD}:
        causes.append("the vocabulary was resized; set text_config.vocab_size to the first dim in the files")
    elif misshaped:
        causes.append("config.json belongs to a model of another size than the weights")
    return causes


def _naming_causes(missing: list[str], unexpected: list[str], expected: Mapping[str, Shape]) -> list[str]:
    causes = []
    if any(".mlp.experts." in name for name in missing) and any(".mlp.experts." in name for name in unexpected):
        causes.append("the experts are stored under the names of another layout; leave model.layout at auto")
    wrappings = ("base_model.model.", "module.", "_orig_mod.", "model.model.")
    for prefix in wrappings:
        if any(name.startswith(prefix) and name.removeprefix(prefix) in expected for name in unexpected):
            causes.append(f"the keys have the prefix {prefix!r} of a training wrapper; save the model inside it")
    if any(".lora_" in name for name in unexpected):
        causes.append("these are an adapter's weights, not a model's; merge the adapter first")
    if any(f"model.{name}" in expected for name in unexpected):
        causes.append("the keys lack the prefix 'model.'; they were saved from the inner model")
    if any(".language_model." not in name and name.startswith("model.layers.") for name in unexpected):
        causes.append("these are the weights of a text model (model.layers.*, no model.language_model.*)")
    layers = {name.split(".layers.")[1].split(".")[0] for name in unexpected if ".language_model.layers." in name}
    if layers and not missing:
        causes.append(f"the files have more layers than num_hidden_layers in config.json, by {len(layers)}")
    return causes


def _swapped(misshaped: list[str], shapes: Mapping[str, Shape], expected: Mapping[str, Shape]) -> bool:
    return all(shapes[name] == stored_shape(name, expected[name], "hub") for name in misshaped)

"""Whether weight files hold exactly the model that config.json describes; if not, one error with the likely causes."""

from __future__ import annotations

from collections.abc import Mapping

from finetune.architecture.shapes import EMBEDDING, HEAD, VISUAL, Shape, is_expert_stack
from finetune.files.layouts import Layout, stored_shape, stored_shapes
from finetune.files.tensorfile import FLOAT_TYPES, Stored
from finetune.ranks.log import listed


def check_keys(stored: Mapping[str, Stored], shapes: Mapping[str, Shape], layout: Layout, *, where: str) -> None:
    """Raise unless the files hold every tensor of these canonical shapes in this layout, and nothing else.

    A tied head is expected to be absent: it is not among the shapes.
    """
    expected = stored_shapes(shapes, layout)
    missing = [name for name in expected if name not in stored]
    unexpected = [name for name in stored if name not in expected]
    misshaped = [name for name, shape in expected.items() if name in stored and stored[name].shape != shape]
    unreadable = [name for name in expected if name in stored and stored[name].dtype not in FLOAT_TYPES]
    mixed = _mixed_types(stored, expected)
    if not (missing or unexpected or misshaped or unreadable or mixed):
        return
    lines = [f"{where} does not hold the model that its config.json describes (layout {layout}):"]
    if missing:
        lines.append(f"{len(missing)} of {len(expected)} keys missing: {listed(missing)}")
    if unexpected:
        lines.append(f"{len(unexpected)} unexpected: {listed(unexpected)}")
    if misshaped:
        pairs = [f"{name} is {list(stored[name].shape)}, wanted {list(expected[name])}" for name in misshaped]
        lines.append(f"{len(misshaped)} of another shape: {listed(pairs)}")
    if unreadable:
        pairs = [f"{name} is {stored[name].dtype}" for name in unreadable]
        lines.append(f"{len(unreadable)} of a type other than {', '.join(FLOAT_TYPES)}: {listed(pairs)}")
    if mixed:
        lines.append(f"{len(mixed)} expert stacks of several types: {listed(mixed)}")
    shapes_in_files = {name: tensor.shape for name, tensor in stored.items()}
    causes = _causes(missing, unexpected, misshaped, shapes_in_files, expected)
    if unreadable:
        causes.append("the checkpoint is quantised; training needs the original one")
    lines += [f"Likely cause: {cause}." for cause in causes]
    raise ValueError("\n  ".join(lines))


def _mixed_types(stored: Mapping[str, Stored], expected: Mapping[str, Shape]) -> list[str]:
    """Per-expert keys that make up one stack but are stored in several types: stacking would round some silently."""
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
            "config.json ties the head to the embedding (tie_word_embeddings true), but the files hold a head of their "
            "own; with true the head would be dropped, so set it to false if the head was trained apart"
        )
    if missing == [HEAD]:
        causes.append("the files hold a tied head, but config.json says tie_word_embeddings false")
    if missing and all(name.startswith(VISUAL) for name in missing):
        causes.append("these are the weights of a text model; the vision tower is not in them")
    if misshaped and all(is_expert_stack(name) for name in misshaped) and _swapped(misshaped, shapes, expected):
        causes.append(
            "the experts are stored in the other fused layout; leave model.layout at auto, or set it to hub (published "
            "files, transformers 4) or memory (saved by transformers 5)"
        )
    elif misshaped and set(misshaped) <= {EMBEDDING, HEAD}:
        causes.append("the vocabulary was resized; set text_config.vocab_size to the files' first dim")
    elif misshaped:
        causes.append("config.json belongs to another size than the weights")
    return causes


def _naming_causes(missing: list[str], unexpected: list[str], expected: Mapping[str, Shape]) -> list[str]:
    causes = []
    if any(".mlp.experts." in name for name in missing) and any(".mlp.experts." in name for name in unexpected):
        causes.append("the experts are stored under other names than this layout has; leave model.layout at auto")
    wrappings = ("base_model.model.", "module.", "_orig_mod.", "model.model.")
    for prefix in wrappings:
        if any(name.startswith(prefix) and name.removeprefix(prefix) in expected for name in unexpected):
            causes.append(f"the keys carry the prefix {prefix!r} of a training wrapper; save the model inside it")
    if any(".lora_" in name for name in unexpected):
        causes.append("these are an adapter's weights, not a model's; merge the adapter first")
    if any(f"model.{name}" in expected for name in unexpected):
        causes.append("the keys lack their first word, model.; they were saved from the inner model")
    if any(".language_model." not in name and name.startswith("model.layers.") for name in unexpected):
        causes.append("these are the weights of a text model (model.layers.*, no model.language_model.*)")
    layers = {name.split(".layers.")[1].split(".")[0] for name in unexpected if ".language_model.layers." in name}
    if layers and not missing:
        causes.append(f"the files hold {len(layers)} more layers than num_hidden_layers in config.json says")
    return causes


def _swapped(misshaped: list[str], shapes: Mapping[str, Shape], expected: Mapping[str, Shape]) -> bool:
    return all(shapes[name] == stored_shape(name, expected[name], "hub") for name in misshaped)

"""Checks that a model's dimensions fit together. Loads no torch."""

from __future__ import annotations

from finetune.architecture.families import Family, Text


def family_problems(family: Family) -> list[str]:
    """Return the contradictions in a family's numbers: one sentence each, with the config's keys; [] if none."""
    return _text_problems(family.text) + _vision_problems(family)


def _text_problems(text: Text) -> list[str]:
    problems = []
    if text.num_attention_heads % text.num_key_value_heads:
        problems.append(
            f"text_config.num_attention_heads {text.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {text.num_key_value_heads}"
        )
    if sum(text.rope.mrope_section) * 2 != text.head_dim:
        problems.append(
            f"mrope_section {list(text.rope.mrope_section)} sums to {sum(text.rope.mrope_section)}, "
            f"but half of text_config.head_dim {text.head_dim} is {text.head_dim / 2:g}"
        )
    if text.rope.type not in ("default", "yarn"):
        problems.append(f"rope_type must be default or yarn, got {text.rope.type!r}")
    if text.rope.type == "yarn" and not (text.rope.factor and text.rope.original_max_position_embeddings):
        problems.append(
            "rope_type yarn needs factor and original_max_position_embeddings: without them the ramp would be wrong"
        )
    if text.rope.type == "default" and text.rope.factor:
        problems.append(f"rope_type is default, so factor {text.rope.factor:g} would be ignored; set rope_type to yarn")
    experts = text.experts
    if experts is not None and not 1 <= experts.num_experts_per_tok <= experts.num_experts:
        problems.append(
            f"num_experts_per_tok {experts.num_experts_per_tok} must be between 1 and num_experts {experts.num_experts}"
        )
    return problems


def _vision_problems(family: Family) -> list[str]:
    vision, text = family.vision, family.text
    problems = []
    if vision.out_hidden_size != text.hidden_size:
        problems.append(
            f"vision_config.out_hidden_size {vision.out_hidden_size} differs from text_config.hidden_size "
            f"{text.hidden_size}"
        )
    if vision.hidden_size % (4 * vision.num_heads):
        problems.append(
            f"vision_config.hidden_size {vision.hidden_size} is not a multiple of 4 x num_heads {vision.num_heads} "
            f"(rows and columns each rotate half of a head)"
        )
    if round(vision.num_position_embeddings**0.5) ** 2 != vision.num_position_embeddings:
        problems.append(f"vision_config.num_position_embeddings {vision.num_position_embeddings} is not a square")
    outside = [index for index in vision.deepstack_visual_indexes if not 0 <= index < vision.depth]
    if outside:
        problems.append(
            f"vision_config.deepstack_visual_indexes {outside} are outside the tower's {vision.depth} blocks (0 to "
            f"{vision.depth - 1})"
        )
    if len(vision.deepstack_visual_indexes) > text.num_hidden_layers:
        problems.append(
            f"vision_config.deepstack_visual_indexes has {len(vision.deepstack_visual_indexes)} entries for "
            f"{text.num_hidden_layers} text layers; each feeds one of the first layers"
        )
    return problems

"""The planner loads no torch, so it repeats numbers of the code that does; here they are held together."""

from finetune.model import loss
from finetune.planner import activations as plan_activations
from finetune.planner import layer as plan_layer
from finetune.planner import moments as plan_moments
from finetune.planner import rank_layout as plan_layout
from finetune.ranks.engine import EngineOptions, engine_config
from moe import experts, host


def test_the_planner_and_the_code_use_the_same_numbers() -> None:
    assert plan_activations.CHUNK_BYTES == experts.CHUNK_BYTES
    assert plan_activations.KEEP_BYTES == experts.KEEP_BYTES
    assert plan_activations.MOVED_BYTES == host.LEAST_BYTES
    assert plan_activations.TILE_BYTES == loss.TILE_BYTES
    assert plan_layer.SLICES == loss.SLICES
    assert EngineOptions().persistence_threshold == plan_layout.PERSISTENCE
    for trained, bucket in ((1, plan_layout.BUCKET[0]), (1 << 40, plan_layout.BUCKET[1])):
        zero = engine_config(EngineOptions(), trained=trained)["zero_optimization"]
        assert zero["reduce_bucket_size"] == bucket
    for layer in (1, 10**9):
        ahead = engine_config(EngineOptions(), largest_layer=layer)["zero_optimization"]["stage3_prefetch_bucket_size"]
        assert ahead == max(plan_moments.LEAST_AHEAD, int(plan_moments.AHEAD * layer))

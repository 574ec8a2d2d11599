"""The table of benchmarks on a CPU; those on GPUs are parts of `benchmarks.gpu`.

A module is imported when its benchmark runs, so that listing costs nothing.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A benchmark: `module` has `def run() -> Iterator[Figure]`, which compares outputs before it measures."""

    name: str
    module: str
    about: str


ENTRIES = (
    Entry(
        name="config-check",
        module="benchmarks.steps.config_check",
        about="cold start of `moetune check` beside `import torch`",
    ),
    Entry(
        name="load",
        module="benchmarks.weights.load",
        about="a base of 1 GB into two ZeRO-3 ranks beside transformers' from_pretrained: time, peak memory",
    ),
    Entry(
        name="mem-per-rank",
        module="benchmarks.weights.mem_per_rank",
        about="weights that a rank keeps at several layouts beside the formula",
    ),
    Entry(
        name="ckpt-save",
        module="benchmarks.weights.ckpt_save",
        about="bytes of a checkpoint beside the trained state, seconds of a save and stall of an asynchronous one",
    ),
    Entry(
        name="train-step",
        module="benchmarks.steps.train_step",
        about="whole training steps on two ranks, beside transformers with PEFT and DeepSpeed ZeRO-3",
    ),
    Entry(
        name="host-overhead",
        module="benchmarks.steps.host_overhead",
        about="time of a micro-batch whose kernels have nothing to do, beside the same stock parts",
    ),
    Entry(
        name="launches",
        module="benchmarks.device.launches",
        about="operations that a decoder layer hands to a device, counted on meta, beside transformers and PEFT",
    ),
    Entry(
        name="waits",
        module="benchmarks.device.waits",
        about="how often the host waits for the device in a micro-batch, counted without one, beside stock parts",
    ),
    Entry(
        name="merge",
        module="benchmarks.weights.merge",
        about="an adapter into a base of 4 GB (MOETUNE_BENCH_GB), beside PEFT's merge_and_unload and a plain copy",
    ),
    Entry(
        name="export",
        module="benchmarks.weights.export",
        about="an adapter into each form that servers read: seconds per GB",
    ),
    Entry(
        name="moe-lora-step",
        module="benchmarks.experts.moe_lora_step",
        about="forward and backward of one expert block with LoRA, beside PEFT's",
    ),
    Entry(
        name="moe-lora-memory",
        module="benchmarks.experts.moe_lora_memory",
        about="bytes that block keeps for backward, and its largest allocation, beside PEFT's",
    ),
    Entry(
        name="scaling-shape",
        module="benchmarks.experts.scaling_shape",
        about="cost of four times the experts at the same top-k, beside PEFT's",
    ),
    Entry(
        name="comm-bytes",
        module="benchmarks.experts.comm_bytes",
        about="weights gathered a micro-batch at ep = world, beside plain ZeRO-3",
    ),
    Entry(
        name="a2a-units",
        module="benchmarks.experts.a2a_units",
        about="rows sent a layer by recompute mode, against the formula",
    ),
    Entry(
        name="packing",
        module="benchmarks.shards.packing",
        about="fill of packs and evenness of a step's packs, beside samples strung together",
    ),
    Entry(
        name="plan",
        module="benchmarks.shards.plan",
        about="laying out an epoch of a million samples",
    ),
    Entry(
        name="resume-cost",
        module="benchmarks.shards.resume",
        about="from a saved position to the next step, beside webdataset reading up to there",
    ),
    Entry(
        name="shards-build",
        module="benchmarks.shards.build",
        about="rows and photos into checked, indexed shards, beside webdataset's TarWriter in a loop",
    ),
    Entry(
        name="data-throughput",
        module="benchmarks.shards.throughput",
        about="shard to samples, images and video, beside webdataset and transformers' processors",
    ),
    Entry(
        name="gather-per-step",
        module="benchmarks.weights.gather_per_step",
        about="frozen weights gathered in one step by its number of micro-batches, resident and partitioned",
    ),
    Entry(
        name="loss-memory",
        module="benchmarks.steps.loss_memory",
        about="memory of head and loss at the real vocabulary, beside transformers' full logits",
    ),
    Entry(
        name="sequence",
        module="benchmarks.long_rows.sequence",
        about="bytes that attention moves a layer over two ranks, against the formula; one row beside one rank's",
    ),
    Entry(
        name="long-memory",
        module="benchmarks.long_rows.long_memory",
        about="what one more token of a row costs at the peak, with each option that saves memory",
    ),
    Entry(
        name="needle",
        module="benchmarks.long_rows.needle",
        about="a small model trained at 4K, rows over two ranks: needles found there, and beyond by YaRN (minutes)",
    ),
    Entry(
        name="planner-accuracy",
        module="benchmarks.planner.planner_accuracy",
        about="what the planner says of memory, traffic and operations over what is counted, at four layouts",
    ),
    Entry(
        name="flop-meter",
        module="benchmarks.steps.flop_meter",
        about="the FLOP meter beside published pairs of tokens/s and TFLOP/s",
    ),
)

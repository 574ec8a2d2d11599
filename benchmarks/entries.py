"""The table of CPU benchmarks; GPU benchmarks are parts of `benchmarks.gpu`.

A module is imported only when its benchmark runs, so that listing costs nothing.
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
        about="cold start of `moetune check`, compared with `import torch`",
    ),
    Entry(
        name="load",
        module="benchmarks.weights.load",
        about="time and peak memory to load 1 GB into two ZeRO-3 ranks, compared with transformers' from_pretrained",
    ),
    Entry(
        name="mem-per-rank",
        module="benchmarks.weights.mem_per_rank",
        about="weights that a rank keeps at several layouts, compared with the formula",
    ),
    Entry(
        name="ckpt-save",
        module="benchmarks.weights.ckpt_save",
        about="size of a checkpoint relative to the trained state, time of a save, and stall of an asynchronous save",
    ),
    Entry(
        name="train-step",
        module="benchmarks.steps.train_step",
        about="full training steps on two ranks, compared with transformers, PEFT and DeepSpeed ZeRO-3",
    ),
    Entry(
        name="host-overhead",
        module="benchmarks.steps.host_overhead",
        about="host time of a micro-batch with almost no kernel work, compared with the same stock parts",
    ),
    Entry(
        name="launches",
        module="benchmarks.device.launches",
        about="operations that a decoder layer launches, counted on meta, compared with transformers and PEFT",
    ),
    Entry(
        name="waits",
        module="benchmarks.device.waits",
        about="number of host waits per micro-batch, counted without a device, compared with stock parts",
    ),
    Entry(
        name="merge",
        module="benchmarks.weights.merge",
        about="a merge into a base of 4 GB (MOETUNE_BENCH_GB), compared with PEFT's merge_and_unload and a plain copy",
    ),
    Entry(
        name="export",
        module="benchmarks.weights.export",
        about="export of an adapter to each form for servers: seconds per GB",
    ),
    Entry(
        name="moe-lora-step",
        module="benchmarks.experts.moe_lora_step",
        about="forward and backward of one expert block with LoRA, compared with PEFT",
    ),
    Entry(
        name="moe-lora-memory",
        module="benchmarks.experts.moe_lora_memory",
        about="bytes that this block keeps for backward, and its largest allocation, compared with PEFT",
    ),
    Entry(
        name="quant-memory",
        module="benchmarks.weights.quant_memory",
        about="bits of a frozen weight in int8 and nf4, compared with bfloat16 and bitsandbytes",
    ),
    Entry(
        name="quant-step",
        module="benchmarks.experts.quant_step",
        about="forward and backward of one expert block beside experts in int8 and nf4, compared with bfloat16",
    ),
    Entry(
        name="quant-load",
        module="benchmarks.weights.quant_load",
        about="time and peak memory to load a base with experts in int8 and nf4, compared with bfloat16",
    ),
    Entry(
        name="scaling-shape",
        module="benchmarks.experts.scaling_shape",
        about="cost of four times the experts at the same top-k, compared with PEFT",
    ),
    Entry(
        name="comm-bytes",
        module="benchmarks.experts.comm_bytes",
        about="weights gathered per micro-batch at ep = world, compared with plain ZeRO-3",
    ),
    Entry(
        name="a2a-units",
        module="benchmarks.experts.a2a_units",
        about="rows sent per layer in each recompute mode, compared with the formula",
    ),
    Entry(
        name="packing",
        module="benchmarks.shards.packing",
        about="fill of packs and evenness of a step's packs, compared with concatenated samples",
    ),
    Entry(
        name="plan",
        module="benchmarks.shards.plan",
        about="time to plan an epoch of a million samples",
    ),
    Entry(
        name="remote-throughput",
        module="benchmarks.shards.remote",
        about="an epoch from an S3-style store, compared with a local disk and with a plain GET loop",
    ),
    Entry(
        name="resume-cost",
        module="benchmarks.shards.resume",
        about="time from a saved position to the next step, compared with webdataset, which reads up to it",
    ),
    Entry(
        name="overlap",
        module="benchmarks.shards.overlap",
        about="share of copies, crops, re-encodings and rewordings that `moetune shards overlap` finds",
    ),
    Entry(
        name="shards-build",
        module="benchmarks.shards.build",
        about="building checked, indexed shards from rows and photos, compared with a loop that decodes and writes",
    ),
    Entry(
        name="rows",
        module="benchmarks.shards.rows",
        about="reading and decoding the images of a parquet file, compared with datasets",
    ),
    Entry(
        name="index-foreign",
        module="benchmarks.shards.foreign",
        about="indexing a tar of images and captions in GB/s, compared with one pass of webdataset",
    ),
    Entry(
        name="data-throughput",
        module="benchmarks.shards.throughput",
        about="reading samples, images and videos from a shard, compared with webdataset and transformers' processors",
    ),
    Entry(
        name="gather-per-step",
        module="benchmarks.weights.gather_per_step",
        about="frozen weights gathered per step by number of micro-batches, resident and partitioned",
    ),
    Entry(
        name="loss-memory",
        module="benchmarks.steps.loss_memory",
        about="memory of head and loss at the real vocabulary, compared with transformers' full logits",
    ),
    Entry(
        name="sequence",
        module="benchmarks.long_rows.sequence",
        about="bytes that attention moves per layer over two ranks, compared with the formula; time against one rank",
    ),
    Entry(
        name="long-memory",
        module="benchmarks.long_rows.long_memory",
        about="peak memory per additional token of a row, with each memory-saving option",
    ),
    Entry(
        name="needle",
        module="benchmarks.long_rows.needle",
        about="needles found by a small model trained at 4K tokens over two ranks, and beyond with YaRN (minutes)",
    ),
    Entry(
        name="planner-accuracy",
        module="benchmarks.planner.planner_accuracy",
        about="the planner's predictions of memory, traffic and operations over the counted values, at four layouts",
    ),
    Entry(
        name="flop-meter",
        module="benchmarks.steps.flop_meter",
        about="the FLOP meter compared with published pairs of tokens/s and TFLOP/s",
    ),
)

"""The parts of the kit, in order of what must be known first. Each runs in a process of its own; see `runner`."""

from dataclasses import dataclass


class Skipped(Exception):
    """A part that has nothing to do on this machine; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the kit: `run` is module:function, a `(Sizes) -> Iterator[Figure]`; `seconds` its limit of ten minutes.

    Outputs are compared before anything is timed; a figure below its floor fails the part.
    """

    name: str
    run: str
    seconds: int
    about: str


PARTS = (
    Part(name="tests", run="benchmarks.gpu.suite:run", seconds=75, about="the tests marked gpu"),
    Part(
        name="attention",
        run="benchmarks.gpu.attention:run",
        seconds=30,
        about="attention over packed rows against each sample by itself: forward, backward, time",
    ),
    Part(
        name="step-exact",
        run="benchmarks.gpu.exact:run",
        seconds=45,
        about="losses and gradients against the CPU: text, images, video, DeepStack, each recompute mode",
    ),
    Part(
        name="engine",
        run="benchmarks.gpu.engine:run",
        seconds=80,
        about="whole runs: steps, save, asynchronous save, restore, offload, evaluation with answers",
    ),
    Part(
        name="engine-ranks",
        run="benchmarks.gpu.engine:run_ranks",
        seconds=75,
        about="the same steps on all GPUs: expert parallel, sequence parallel, partitioned by ZeRO-3",
    ),
    Part(
        name="all-to-all",
        run="benchmarks.gpu.exchange:run",
        seconds=20,
        about="rows to experts on other GPUs and back: values and rate",
    ),
    Part(
        name="patches",
        run="benchmarks.gpu.patches:run",
        seconds=15,
        about="the patch embedding as a linear product, beside Conv3d",
    ),
    Part(name="layer", run="benchmarks.gpu.layer:run", seconds=45, about="one layer of the 30B model, time by kernel"),
    Part(
        name="experts",
        run="benchmarks.gpu.experts:run",
        seconds=25,
        about="one expert block of the 30B model with LoRA beside PEFT's: time and memory",
    ),
    Part(
        name="gpu-step",
        run="benchmarks.gpu.step:run",
        seconds=120,
        about="whole steps of some layers of the 30B model, beside transformers with PEFT: tokens/s, memory, time",
    ),
    Part(
        name="gpu-step-whole",
        run="benchmarks.gpu.step:run_whole",
        seconds=170,
        about="whole steps of all layers, where the GPU has the memory",
    ),
    Part(name="gpu-step-ranks", run="benchmarks.gpu.step:run_ranks", seconds=60, about="whole steps on all GPUs"),
    Part(name="gpu-step-liger", run="benchmarks.gpu.step:run_liger", seconds=20, about="the peer with Liger's kernels"),
)

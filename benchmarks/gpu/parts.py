"""The parts of the kit, the most basic checks first. Each runs in its own process; see `runner`."""

from dataclasses import dataclass


class Skipped(Exception):
    """A part has nothing to do on this machine; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the kit: `run` is module:function, a `(Sizes) -> Iterator[Figure]`.

    `seconds` is the part's limit in a run of ten minutes, and scales with the minutes of the run.
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
        about="attention over packed rows, compared with single samples: forward, backward, time",
    ),
    Part(
        name="step-exact",
        run="benchmarks.gpu.exact:run",
        seconds=45,
        about="losses and gradients compared with the CPU: text, images, video, DeepStack, each recompute mode",
    ),
    Part(
        name="engine",
        run="benchmarks.gpu.engine:run",
        seconds=80,
        about="complete runs: steps, save, asynchronous save, restore, offload, evaluation with answers",
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
        about="the patch embedding as a linear product, compared with Conv3d",
    ),
    Part(name="layer", run="benchmarks.gpu.layer:run", seconds=45, about="one layer of the 30B model, time by kernel"),
    Part(
        name="experts",
        run="benchmarks.gpu.experts:run",
        seconds=25,
        about="one expert block of the 30B model with LoRA, compared with PEFT: time and memory",
    ),
    Part(
        name="gpu-step",
        run="benchmarks.gpu.step:run",
        seconds=120,
        about="full steps of some layers of the 30B model, compared with transformers and PEFT: tokens/s, memory, time",
    ),
    Part(
        name="gpu-step-whole",
        run="benchmarks.gpu.step:run_whole",
        seconds=170,
        about="full steps of all layers, if the GPU has enough memory",
    ),
    Part(name="gpu-step-ranks", run="benchmarks.gpu.step:run_ranks", seconds=60, about="full steps on all GPUs"),
    Part(name="gpu-step-liger", run="benchmarks.gpu.step:run_liger", seconds=20, about="the peer with Liger's kernels"),
)

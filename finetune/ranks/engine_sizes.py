"""Sizes of the engine's buffers, in elements, for its configuration and for the planner. Loads no torch."""

PERSISTENCE = 1_000_000
"""Smaller parameters stay gathered between steps; above any router (524,288 at 235B)."""
REUSE = 1_000_000_000
"""A parameter that is used again within this many elements is not released; DeepSpeed's default."""
SUB_GROUP = 1_000_000_000
"""The optimizer updates this many of a rank's elements at a time; DeepSpeed's default."""
LEAST_BUCKET = 1_000_000
"""The bucket through which gradients leave is at least this large."""
MOST_BUCKET = 100_000_000
"""The bucket through which gradients leave is at most this large."""
UPDATED = 1 << 24
"""Moments that the optimizer brings to the device at a time, if they are of another type or in host memory."""
PREFETCHED_LAYERS = 1.2
"""The number of decoder layers that are fetched ahead."""
LEAST_PREFETCH = 50_000_000
"""At least this many elements are fetched ahead."""


def bucket_elements(trained: int) -> int:
    """Return the size of the bucket through which the gradients of `trained` elements leave."""
    return min(max(trained, LEAST_BUCKET), MOST_BUCKET)

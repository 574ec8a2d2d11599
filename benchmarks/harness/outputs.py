"""Compare the tensors of two sides before anything is timed."""

from collections.abc import Mapping

from torch import Tensor

from benchmarks.harness.measure import OutputsDiffer


def same_tensors(ours: Mapping[str, Tensor], peer: Mapping[str, Tensor], *, relative: float) -> dict[str, float]:
    """Return each tensor's largest error relative to the peer's largest value; raise if one is above `relative`.

    A peer's tensor of zeros raises too, because agreeing with it proves nothing.
    """
    if ours.keys() != peer.keys():
        raise OutputsDiffer(f"ours gives {sorted(ours)}, the peer gives {sorted(peer)}")
    errors = {}
    for name, expected in peer.items():
        if ours[name].shape != expected.shape:
            raise OutputsDiffer(f"{name} has shape {tuple(ours[name].shape)}, the peer's has {tuple(expected.shape)}")
        scale = expected.abs().max().item()
        if scale == 0.0:
            raise OutputsDiffer(f"{name} is all zeros on the peer's side, so that agreeing with it proves nothing")
        errors[name] = (ours[name].double() - expected.double()).abs().max().item() / scale
    wrong = {name: error for name, error in errors.items() if not error <= relative}
    if wrong:
        listed = ", ".join(f"{name} by {error:.1e}" for name, error in wrong.items())
        raise OutputsDiffer(f"relative to the largest value, with {relative:.0e} allowed: {listed}")
    return errors

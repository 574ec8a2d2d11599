"""Compares the flight recorders of a run's ranks: who waits in which collective, and who did not join it. No torch.

Every rank counts the collectives of each of its groups. A rank whose count is behind took another path. If the counts
are equal and the collectives differ, the ranks called different ones.
"""

import json
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.ranks.log import ranks_named

NCCL, GLOO = "flight-", "flight-gloo-"
"""Beginnings of the file names of each backend; the number of the rank follows."""
_DAMAGE = (
    pickle.UnpicklingError,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ImportError,
    OverflowError,
    MemoryError,
    RecursionError,
)
"""Errors that a damaged dump, or one of another form, may raise when it is read: pickle promises no smaller set."""


@dataclass(frozen=True, kw_only=True)
class Flight:
    """The records of one rank: its collectives, oldest first, and the ranks of each group."""

    entries: tuple[Mapping[str, Any], ...] = ()
    members: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    damaged: tuple[str, ...] = ()
    """The names of files that could not be read, or only in part."""

    def last(self) -> dict[str, Mapping[str, Any]]:
        """Return the newest collective of each group; a message between two ranks does not count."""
        return {_group(entry): entry for entry in self.entries if not entry.get("is_p2p")}


class _Plain(pickle.Unpickler):
    """Reads the recorder's dumps, which are pickles of plain containers; refuses anything else."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"a dump must hold plain values only, got {module}.{name}")


def read_flight(logs: Path, rank: int) -> Flight:
    """Read the dumps of a rank, of every backend; the flight is empty if nothing can be read."""
    entries: list[Mapping[str, Any]] = []
    members: dict[str, tuple[int, ...]] = {}
    damaged: list[str] = []
    for path in (logs / f"{name}{rank}" for name in (NCCL, GLOO)):
        if not path.exists():
            continue
        try:
            with path.open("rb") as file:
                record = _Plain(file).load()
            groups = {
                str(name): tuple(map(int, json.loads(group["ranks"])))
                for name, group in record.get("pg_config", {}).items()
                if group.get("ranks")
            }
            all_entries = list(record.get("entries", ()))
        except _DAMAGE:
            damaged.append(path.name)
            continue
        sound = [entry for entry in all_entries if _is_sound(entry)]
        damaged += [path.name] if len(sound) < len(all_entries) else []
        entries += sound
        members |= groups
    return Flight(entries=tuple(entries), members=members, damaged=tuple(damaged))


def _is_sound(entry: Any) -> bool:
    """Return whether an entry has all that a report says about a collective."""
    try:
        _group(entry), _number(entry), _waits(entry), _kind(entry), _called(entry)
    except _DAMAGE:
        return False
    return True


def missed(flights: Mapping[int, Flight]) -> Iterator[str]:
    """Yield a sentence for each group whose ranks are not in the same collective."""
    last = {rank: flight.last() for rank, flight in flights.items() if flight.entries}
    for group in sorted({group for collectives in last.values() for group in collectives}):
        ranks = _members(flights, last, group)
        counts = {rank: _number(last[rank][group]) if group in last[rank] else 0 for rank in ranks if rank in last}
        most = max(counts.values())
        ahead = [rank for rank in counts if counts[rank] == most]
        entry = last[ahead[0]][group]
        if not _waits(entry):
            continue
        late = [rank for rank in counts if counts[rank] < most]
        silent = [rank for rank in ranks if rank not in last]
        others = [rank for rank in ahead if _kind(last[rank][group]) != _kind(entry)]
        first = [rank for rank in ahead if rank not in others]
        if late:
            late_entry = last[late[0]].get(group)
            latest = f"{_what(late_entry)}, number {counts[late[0]]}" if late_entry is not None else "none yet"
            yield (
                f"{_waiting(ahead)} in {_called(entry)}, number {most} of {_name(group)}, which {ranks_named(late)} "
                f"did not join: the last one there was {latest}"
            )
        elif others:
            other_entry = last[others[0]][group]
            yield (
                f"{_waiting(first)} in {_called(entry)}, and {ranks_named(others)} in "
                f"{_called(other_entry)}, both number {most} of {_name(group)}: they took different paths"
            )
        elif silent:
            yield (
                f"{_waiting(ahead)} in {_called(entry)}, number {most} of {_name(group)}; {ranks_named(silent)} "
                f"left no record"
            )


def flight_lines(flight: Flight, shown: int = 3) -> Iterator[str]:
    """Describe a rank's last collectives."""
    for entry in flight.entries[-shown:]:
        state = "waits" if _waits(entry) else "done"
        yield f"  {_name(_group(entry))} {_number(entry)}: {_called(entry)} {state}"


def _members(flights: Mapping[int, Flight], last: Mapping[int, Mapping[str, Any]], group: str) -> list[int]:
    name = group.partition(":")[2].partition(" ")[0]
    members = {rank for flight in flights.values() for rank in flight.members.get(name, ())}
    return sorted(members | {rank for rank, collectives in last.items() if group in collectives})


def _waiting(ranks: Sequence[int]) -> str:
    return f"{ranks_named(ranks)} wait{'s' if len(ranks) == 1 else ''}"


def _group(entry: Mapping[str, Any]) -> str:
    name, description = entry["process_group"]
    return f"{str(entry['profiling_name']).partition(':')[0]}:{name} {description}"


def _name(group: str) -> str:
    backend, _, name = group.partition(":")
    number, _, description = name.partition(" ")
    is_known = description not in ("", "undefined")
    return f"{backend} group {number}" + (f" ({description})" if is_known else "")


def _number(entry: Mapping[str, Any]) -> int:
    return int(entry["collective_seq_id"])


def _waits(entry: Mapping[str, Any]) -> bool:
    return not entry.get("retired") and entry.get("state") != "completed"


def _kind(entry: Mapping[str, Any]) -> str:
    """Return the part that must be the same on all ranks of a group; the rows of an all-to-all may differ."""
    return "all_to_all" if ":all_to_all" in str(entry["profiling_name"]) else _what(entry)


def _what(entry: Mapping[str, Any]) -> str:
    return f"{str(entry['profiling_name']).partition(':')[2]} {entry.get('input_sizes') or ''}".strip()


def _called(entry: Mapping[str, Any]) -> str:
    """Describe a collective, and the line of our code that called it."""
    for frame in entry.get("frames", ()):
        if re.search(r"/(finetune|moe|data)/[\w/]+\.py$", frame["filename"]):
            return f"{_what(entry)} called by {frame['name']} ({Path(frame['filename']).name}:{frame['line']})"
    return _what(entry)

"""The limit of a rank in a save, state by state, with a clock that the test moves."""

from pathlib import Path

import pytest

from finetune.ranks.save_limit import SaveLimit, SaveState

LIMIT = 10.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("finetune.ranks.save_limit.time", clock)
    return clock


def test_a_waiting_rank_ends_if_no_other_rank_works_at_two_checks(tmp_path: Path, clock: Clock) -> None:
    others: list[str] = []
    save = SaveLimit(LIMIT, another_works=lambda: bool(others))
    save.begin(tmp_path)
    assert _passed_after(LIMIT, save, clock) == 0.0, "not yet over its limit"
    others.append("rank 1")
    assert _passed_after(1.0, save, clock) == 0.0
    assert save.state is SaveState.WAITING, "another rank works"
    others.clear()
    assert _passed_after(LIMIT + 1, save, clock) == 0.0
    assert save.state is SaveState.IDLE_ONCE, "a rank may have begun without having said so"
    others.append("rank 1")
    assert _passed_after(LIMIT / 2 + 1, save, clock) == 0.0
    assert save.state is SaveState.WAITING
    others.clear()
    assert _passed_after(LIMIT + 1, save, clock) == 0.0
    assert _passed_after(LIMIT / 2, save, clock) == 0.0, "half a limit, and not over it"
    assert _passed_after(1.0, save, clock) == LIMIT


def test_a_working_rank_has_eight_limits_since_the_last_byte(tmp_path: Path, clock: Clock) -> None:
    save = SaveLimit(LIMIT, another_works=lambda: False)
    save.begin(tmp_path)
    save.work(True)
    part = tmp_path / "step-000001.partial" / "shard"
    part.parent.mkdir()
    part.write_bytes(b"1")
    assert _passed_after(LIMIT + 1, save, clock) == 0.0, "the first check"
    part.write_bytes(b"12")
    assert _passed_after(7 * LIMIT, save, clock) == 0.0, "it has grown"
    assert _passed_after(8 * LIMIT, save, clock) == 0.0
    assert _passed_after(1.0, save, clock) == 8 * LIMIT
    save.work(False)
    assert (save.state, save.passed()) == (SaveState.WAITING, 0.0)


def test_a_suspended_process_is_not_stuck(tmp_path: Path, clock: Clock) -> None:
    save = SaveLimit(LIMIT, another_works=lambda: False)
    save.begin(tmp_path)
    clock.now += 100.0
    save.add_pause(100.0)
    assert (save.state, save.passed()) == (SaveState.WAITING, 0.0)


def test_a_change_by_the_rank_itself_takes_precedence(tmp_path: Path, clock: Clock) -> None:
    """A rank begins to work while the other thread looks at the other ranks."""

    def look() -> bool:
        save.work(True)
        return False

    save = SaveLimit(LIMIT, another_works=look)
    save.begin(tmp_path)
    assert _passed_after(LIMIT + 1, save, clock) == 0.0
    assert save.is_working


def test_without_a_limit_a_rank_never_ends(tmp_path: Path, clock: Clock) -> None:
    save = SaveLimit(0.0, another_works=lambda: False)
    save.begin(tmp_path)
    assert _passed_after(1e6, save, clock) == 0.0
    save.work(True)
    assert _passed_after(1e6, save, clock) == 0.0


def _passed_after(seconds: float, save: SaveLimit, clock: Clock) -> float:
    clock.now += seconds
    return save.passed()

"""The time limit of waits in tests: long enough to end only hanging processes, even on a busy machine."""

LIMIT_S = 900.0
"""Seconds; more than ten times the duration of the longest single start or script on two idle cores."""

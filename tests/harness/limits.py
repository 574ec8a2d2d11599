"""How long a test waits for what must come: so long that only what hangs is ended, also on a busy machine."""

LIMIT_S = 900.0
"""More than ten times what the longest single start, or script, takes on two quiet cores."""

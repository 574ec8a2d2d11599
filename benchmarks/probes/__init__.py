"""Shows that each probe detects what it is about: `python -m benchmarks.probes`.

Reading order: cases (what is trained and compared), detect (one case, one seed), record (the numbers and their table).
"""

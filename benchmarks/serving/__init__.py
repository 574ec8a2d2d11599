"""Proves on live servers that they compute what was trained: `make serve-proof`, `python -m benchmarks.serving`.

Reading order: environments (a server's packages, installed and patched), cases (what is served), material (bases, rows,
adapters, merged folders), proof (one server started and compared), record (what came out).
"""

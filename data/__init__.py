"""Shards to batches. Knows no process group and no engine: rank and world size arrive as plain integers."""

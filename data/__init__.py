"""Shards to batches. Knows no process group and no engine: rank and world size arrive as plain integers.

Rooms, lowest first: format < rows | render | stores < shards < stream | prepare. `open` puts them together for a
run, `peek` looks at the first samples before one.
"""

"""Shards read by number: index, bytes, lengths.

Reading order: names, find and unpack (the shards of a source); sidecar, index, layout and scan (what a shard holds),
bytes and reader (a sample of it), lengths, questions; pool.
"""

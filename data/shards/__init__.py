"""Shards read by number: index, bytes, lengths.

Reading order: sidecar, index and scan (what a shard holds), bytes and reader (a sample of it), lengths, questions;
pool.
"""

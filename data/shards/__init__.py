"""Shards read by number: index, bytes, lengths."""

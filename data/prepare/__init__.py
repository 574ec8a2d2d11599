"""Rows into shards, and every look at shards that is not training."""

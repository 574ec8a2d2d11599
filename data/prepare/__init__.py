"""Rows into shards, and every look at shards that is not training.

Reading order: convert, media_place and rows (rows of other tools), clean, build and converted; split, audit,
show; progress.
"""

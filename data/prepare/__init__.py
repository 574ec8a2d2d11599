"""Turns rows into shards; checks, shows and splits shards.

Reading order: convert, media_place and rows (rows of other tools), clean, build and converted; split, audit,
show, found; likeness and overlap; progress.
"""

"""Turns rows into shards; checks, shows and splits shards.

Reading order: rows (a row's media and record), clean, build, copies and converted; recognise, found; split, audit,
show; likeness and overlap; progress.
"""

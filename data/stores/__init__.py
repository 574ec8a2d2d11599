"""Shards in object stores and behind http: where they are, and a bounded cache of them on a local disk.

The rest of the code sees a path in the cache; the file behind it is fetched when it is read, or before. Reading order:
remote (what a path stands for), listing, transfer (one object over the network), cache, uses (whose turn it is), ahead.
"""

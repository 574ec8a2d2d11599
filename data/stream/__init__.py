"""Turns shards into the steps of one rank: corpus, plan, packs, batches.

Reading order: corpus, reach, licences and stats; pack and plan (which samples make which step); batch, pack_reader,
being_read and stream.
"""

"""Finds everything that would stop a run, before any rank starts.

Reading order: start (everything about a run, at once), places, sources, base and run_folder (what it looks at), rank
(rank 0 under a launcher that is not ours); epochs (how many steps they
are); doctor (the machine), cluster_check (the nodes together).
"""

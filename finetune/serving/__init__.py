"""Serves what was trained: the exact command of each server, and a server that is started, checked and ended.

Reading order: commands (what to pass to which server), process (a server from its start to its end).
"""

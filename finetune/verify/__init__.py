"""Proofs by computation: a base against transformers, a merge against base and adapter.

Reading order: base with card, samples, text, streaming and compute; merged.
"""

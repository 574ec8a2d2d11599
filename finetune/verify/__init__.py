"""Proofs by computing: a base against transformers, a merge against base and adapter."""

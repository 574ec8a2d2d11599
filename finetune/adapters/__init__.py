"""Adapter files: read, written, exported, combined, merged."""

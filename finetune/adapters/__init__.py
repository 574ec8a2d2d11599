"""Adapter files: read, written, exported, combined, merged.

Reading order: keys, targets, forms, change and source (any tool's file); contents, file and reopen (ours); write,
card and provenance; export, combine, and merge with merge_plan and merge_blocks.
"""

"""Adapter files: read, written, exported, combined, merged.

Reading order: keys, targets, forms, change and source (any tool's file); contents and file (ours); write and
write_trained with card, provenance and reopen; export, combine, and merge with merge_plan and merge_blocks.
"""

"""Read, write, export, combine and merge adapter files.

Reading order: keys, targets, forms, change and source (files of any tool); contents and file (our own); write and
write_trained with card, provenance and reopen; export, combine, and merge with merge_plan and merge_blocks.
"""

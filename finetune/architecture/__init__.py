"""The base model as numbers: sizes, shapes, parts, positions, operations. Loads no torch and no file."""

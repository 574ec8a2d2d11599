"""Turns a record and its media into tokens, patches and positions.

Reading order: image, vision, video and frames (pixels), template and chat (text), timestamps, tokens, positions; sample
puts them together, spelled turns tokens back into text, and fingerprint identifies what its length depends on.
"""

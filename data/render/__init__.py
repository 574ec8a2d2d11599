"""From a record and its media to tokens, patches and positions.

Reading order: image, vision, video and frames (pixels), template and chat (text), timestamps, tokens, positions; sample
puts them together, fingerprint says what decides its length.
"""

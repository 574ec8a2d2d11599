"""Asks a loaded model, or a server, and scores its answers.

Reading order: open_model and speaker (a model that answers), answers and scores with overlaps, local, and endpoint with
exchange (the callables that answer); serve_check with missing_parts.
"""

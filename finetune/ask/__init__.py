"""A loaded model, or a server, asked and scored.

Reading order: open_model and speaker (a model that answers), local and endpoint (who is asked), answers and scores;
serve_check; needle with heatmap, and overlaps.
"""

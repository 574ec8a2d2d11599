"""Reads, checks and completes recipes. Loads no torch.

Reading order: recipes (YAML and overrides), typed and problems (values and their problems), derive (numbers that
follow), published (values from the literature), attention; checks and the check_* files (combinations of values),
stages and schedule; shipped (recipes in the package) and starter (a recipe for a user).
"""

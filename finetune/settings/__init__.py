"""What a recipe may say: read, checked, completed. Loads no torch.

Reading order: recipes (YAML and overrides), typed and problems (values and what is wrong with them), derive (what
`auto` means), published (its sources), attention; checks and the check_* files (what does not fit together), stages
and schedule; shipped (recipes in the package) and starter (one of a user's own).
"""

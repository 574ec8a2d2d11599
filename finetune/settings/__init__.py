"""What a recipe may say: read, checked, derived from. Loads no torch."""

"""Before a run: what it will take, and what would stop it."""

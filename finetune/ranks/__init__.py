"""One process of a run: its engine, its talk with the others, its log, and how it ends."""

"""A model folder on disk: fetched, read, checked and written as the hub has it."""

"""The network: built on meta, adapted, filled, and what one packed row computes in it."""

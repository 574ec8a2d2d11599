"""Mixture-of-experts layers: routing, grouped experts with LoRA, expert parallelism, load balancing. Knows no data."""

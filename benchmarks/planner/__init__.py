"""Compare the planner with measurements, and record its predictions."""

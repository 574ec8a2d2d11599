"""The planner beside what was measured, and its predictions."""

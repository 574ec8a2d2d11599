"""What happens in a run beside the arithmetic: data, updates, evaluation, tracking, bad steps."""

"""The parts of the training loop: setup, data, updates, evaluation, bad steps.

Reading order: setup (puts a run together) and state (saves and resumes it), steps (data) and update (one step),
optimiser_groups, bad_steps and replay; evaluation, predictions and verdict; run_config, results, dry_run.
"""

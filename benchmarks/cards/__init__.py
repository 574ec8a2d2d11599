"""Learning cards, `python -m benchmarks cards`: what tiny models learn on a CPU, by task and by adapted part.

Reading order: tasks (what is asked), course (bases, adapters, scores), record (the numbers and their tables), command.
"""

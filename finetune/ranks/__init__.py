"""One process of a run: its engine, what it says to the others, its log, and how it ends.

Reading order: engine and hooks (DeepSpeed), collectives, device, versions and log; then watch, heartbeats and
failures (a run that must end); flight, flight_reading, autopsy and stall_text (why it ended).
"""

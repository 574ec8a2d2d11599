"""One process of a run: its engine, its exchanges with other ranks, its log, and its end.

Reading order: engine and hooks (DeepSpeed), collectives, device, versions and log; then watch, signals, save_limit,
heartbeats and failures (a run that must end); flight, flight_reading, autopsy and stall_text (why it ended).
"""

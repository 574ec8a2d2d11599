"""The command line and how processes start. Loads no torch at import."""

from moetune_guard import require_fit

require_fit(program=True)

"""The command line and how processes start. Loads no torch at import."""

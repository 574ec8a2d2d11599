"""A loaded model, or a server, asked and scored."""

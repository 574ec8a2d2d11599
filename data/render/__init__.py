"""From a record and its media to tokens, patches and positions."""

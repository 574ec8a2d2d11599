"""A sample as it is written: record, media, tar. No torch."""

"""A sample as it is written: record, media, tar; printable. No torch.

Reading order: record with fields, content, media and turns; facts (what is known of a medium without its pixels);
tar; printable.
"""

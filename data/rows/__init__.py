"""Rows of any shape, as other tools write them, turned into our record. No torch, no decoder.

Reading order: files (which files a source is made of), containers and json_list (files to rows), columns (`map`),
shapes with chats, documents and steps (a row to messages), convert (messages to our record), refused (what is not
read, and why); media, pdf and archive (where a row's media are); members and energon (a foreign tar's samples as
rows); extras (packages that need not be installed).
"""

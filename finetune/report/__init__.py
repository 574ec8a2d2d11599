"""The report of a run as one HTML file, its pictures, and the list of runs, all from what runs leave in their folders.

Reading order: files (reads a run's folder), state; facts, curves, load, events, samples (one part of the page each);
page puts them together within its size, pictures draws the PNG files, listing is `moetune runs`. No torch.
"""

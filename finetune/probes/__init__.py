"""Asks a loaded model about made-up media, with one mechanism and without it.

Reading order: trial (a question and its answer), score and picture (what is shown of the result), effects (what is
taken out), colours and letters (what is drawn); then a file for each probe: needle, timestamps, deepstack, order,
resolution, balance.
"""

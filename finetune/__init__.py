"""Composition: configuration, model, engine, loop, checkpoint, export."""

import sys

from moetune_guard import require_fit, stop

_STARTED = sys.argv[:1] == ["-m"]  # so Python calls a program while it looks for the module, as of -m finetune.train
require_fit(program=_STARTED)
if _STARTED:
    from finetune.ranks.versions import torch_problem

    if torch_problem():
        stop(torch_problem())

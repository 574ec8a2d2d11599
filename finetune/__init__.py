"""Fine-tuning: from a recipe to a run, its checkpoints and its adapters.

A room imports only from rooms below it; rooms on one line do not know each other:

                train.py     serving/     probes/           the story of a run | servers | tests of mechanisms
      training/      ask/      verify/      preflight/      the loop's parts | questions | proofs | before a start
      tracking/                                             what a run reports
      checkpoint/                                           the state of a run on disk
      adapters/                                             adapter files, merge, export
      model/                          planner/              the network | what a run will take
      settings/                                             recipes, checks, stages
      files/                                                a model folder on disk
      architecture/                   ranks/                the model in numbers | one process
      config.py                                             every key
"""

import sys

from moetune_guard import require_fit, stop

_STARTED = sys.argv[:1] == ["-m"]  # so Python calls a program while it looks for the module, as of -m finetune.train
_PROGRAM = sys.orig_argv[-len(sys.argv)] if _STARTED else ""
require_fit(program=_STARTED)
if _STARTED:
    from finetune.ranks.versions import torch_problem

    if torch_problem():
        stop(torch_problem())

    if _PROGRAM == "finetune.train":
        from finetune.preflight.rank import look_first

        look_first(sys.argv[1:])

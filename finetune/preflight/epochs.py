"""The steps of a run of epochs before it starts, where its shards have been indexed. Loads no torch."""

from dataclasses import replace
from pathlib import Path

from data.peek import plans_of_epochs
from data.render.fingerprint import files_fingerprint
from data.shards.bytes import places_of
from data.stream.plan import plan_settings, steps_of_epochs
from finetune.config import RunConfig


def counted(config: RunConfig) -> RunConfig:
    """Return the run with its steps, if all lengths beside its shards are those of its base; else as it is."""
    folder, data = Path(config.model.path), config.data
    if config.schedule.steps or not (folder / "tokenizer_config.json").is_file():
        return config
    fingerprint = files_fingerprint(folder, image=data.image, video=data.video, chat=data.chat)
    settings = plan_settings(data, seed=config.run.seed)
    try:
        plans = plans_of_epochs(data, settings, places_of(data), files_fingerprint=fingerprint)
        steps = 0 if plans is None else steps_of_epochs(plans, config.schedule.epochs)
    except (ValueError, OSError):  # the data cannot be read, or do not fill a step: a start says so
        return config
    return replace(config, schedule=replace(config.schedule, steps=steps))

"""Settings of the test tools for the whole suite."""

from hypothesis import settings

settings.register_profile("moetune", deadline=None)  # a busy machine must not fail a property
settings.load_profile("moetune")

"""Writing a model of a run for other tools."""

"""Studies: the models, data and measurements of a run."""

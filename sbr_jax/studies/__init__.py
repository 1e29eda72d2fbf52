"""Studies: models, data and measurements that a run goes over."""

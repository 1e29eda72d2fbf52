"""Memory and hours of a run, computed from sizes before it starts."""

"""Estimates memory and hours of a run from sizes, before it starts."""

"""Maintainers' programs: published tables and the origin of their numbers."""

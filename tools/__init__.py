"""Programs for the maintainers: published tables and where their numbers come from."""

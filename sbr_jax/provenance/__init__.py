"""Hashes the code that decides a method's numbers."""

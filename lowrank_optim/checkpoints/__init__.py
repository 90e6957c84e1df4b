"""Saving, loading, and reading what other packages saved."""

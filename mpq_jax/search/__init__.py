"""Searches bit configurations by inference alone."""

"""Checks of what comes from outside: numbers, JSON, and which packages are installed."""

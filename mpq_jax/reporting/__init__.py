"""Plots and the HTML report of a search."""

"""Hands trained networks over: files that run without the trainer."""

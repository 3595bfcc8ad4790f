"""Command-line programs: flags become library calls."""

"""Runs `mpq_jax.cli.search` from a checkout."""

from mpq_jax.cli.search import run

if __name__ == "__main__":
    run()

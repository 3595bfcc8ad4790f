"""Runs `mpq_jax.cli.train` from a checkout."""

from mpq_jax.cli.train import run

if __name__ == "__main__":
    run()

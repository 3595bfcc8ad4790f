"""`python -m mpq_jax`: the same as the command `mpq`."""

from mpq_jax.cli.main import run

if __name__ == "__main__":
    run()

"""The same as `mpq search`, from a checkout."""

from mpq_jax.cli.main import run

if __name__ == "__main__":
    run("search")

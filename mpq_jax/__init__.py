"""Mixed bit-width quantisation in JAX: train once, then search the bits of every layer."""

"""Mixed bit-width quantization in JAX: train once, then search the bits of every layer."""

"""Packed files: the integers of a network at their own numbers of bits, in one safetensors file.

`reader` reads them with NumPy and safetensors alone; `writer` writes them; `network` runs them.
"""

"""Integer kernels packed at their bit-widths in one safetensors file."""

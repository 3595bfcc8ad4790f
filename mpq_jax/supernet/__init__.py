"""The supernet: bit-widths, layer tables, sampling, selection, costs and sensitivity."""

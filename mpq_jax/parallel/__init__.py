"""Devices and processes: meshes, shardings, distributed start-up, gradient accumulation."""

"""Models as pure functions: the adapters of module libraries."""

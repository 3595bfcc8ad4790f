"""Training losses and evaluation metrics."""

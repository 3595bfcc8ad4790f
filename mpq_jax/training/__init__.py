"""Training runs: experiments, the training loop, metrics and checkpoints."""

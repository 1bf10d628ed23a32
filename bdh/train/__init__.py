"""Training: settings, the loop, optimizers, checkpoints, export."""

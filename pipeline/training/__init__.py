"""Training: state, optimizers, step, trainer, callbacks, checkpoints, resume."""

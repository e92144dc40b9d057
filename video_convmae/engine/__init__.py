"""Training and inference: tasks, the loop, optimizers, checkpoints, logs, processes."""

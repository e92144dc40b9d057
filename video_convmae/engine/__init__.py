"""What makes a model learn: tasks, the loop, optimizers, checkpoints, logs, processes."""

"""Training: state and pure steps, optimizer groups, sharding, checkpoints, logs, and the loop.

`loop.train` and `loop.evaluate` are what the command calls; `step.train_step` is the step.
"""

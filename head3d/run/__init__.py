"""Run bookkeeping: configuration, checkpoints, logs, seeds, processes."""

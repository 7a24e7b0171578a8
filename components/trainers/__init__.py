"""Trainers: one file per algorithm, with its options, losses and `train_step`."""

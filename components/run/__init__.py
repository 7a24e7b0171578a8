"""One run: its arguments, folder, checkpoints and clock, and how its processes stop."""

"""Environment factories: one file per family."""

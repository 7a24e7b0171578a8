"""Dataset factories: one file per format, and the demonstration makers."""

"""Dataset factories: one file per format, and one for each generator of demonstrations."""

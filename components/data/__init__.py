"""What a dataset holds and how batches come from it: features, order, normalisation, augmentation, random states."""

"""What makes an update faster and leaves its numbers alone: compiled losses, CUDA graphs, matrix products."""

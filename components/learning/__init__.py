"""The learner (models, optimizers and trainer), its gradients and metrics, and the loss on held-out data."""

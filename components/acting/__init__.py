"""Policies in the environment's units, with histories and chunks: acting, evaluation, saving and loading."""

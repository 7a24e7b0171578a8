"""Online experience: stepping environments, replay buffers, rollouts, recordings."""

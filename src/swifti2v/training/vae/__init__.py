"""Training of a video VAE."""

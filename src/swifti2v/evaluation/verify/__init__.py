"""Checks of a model on the machine of a user: files, LoRAs, encoders, VAEs, denoising, a short clip."""

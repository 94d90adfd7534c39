"""Training of a relay of two LoRAs on images."""

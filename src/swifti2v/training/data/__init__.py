"""From a manifest to the frames of a sample."""

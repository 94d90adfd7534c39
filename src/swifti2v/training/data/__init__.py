"""Turn a manifest into the frames of samples."""

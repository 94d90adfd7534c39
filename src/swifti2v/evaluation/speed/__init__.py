"""Speed and memory of this package's parts beside diffusers' own, measured in one run."""

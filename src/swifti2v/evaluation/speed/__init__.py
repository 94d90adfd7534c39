"""How fast and how large: this package's parts beside diffusers' own, measured in one run."""

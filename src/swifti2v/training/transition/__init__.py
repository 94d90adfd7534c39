"""Stage-transition samples: true clips as Stage I draws them."""

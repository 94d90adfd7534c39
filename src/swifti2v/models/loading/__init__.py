"""Load the components of a model by its name."""

"""Everything that is trained: data, objectives, loops."""

"""Training of the small demo checkpoints that ship with the model plugins."""

"""What the fused operators compute, a module for each kind."""

"""The documented rules of the fused operators and of the chips, a module for each kind of operator."""

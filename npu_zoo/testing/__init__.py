"""What tests of the zoo, and of plugins for it, are written with. Importing it imports no torch."""

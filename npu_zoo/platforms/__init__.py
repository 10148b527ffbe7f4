"""What can be learned of the machine without torch."""

"""``eval``: how well a model answers, by tasks of the language model evaluation harness and of our own."""

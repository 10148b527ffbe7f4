"""Two results of the same evaluation side by side: answers, accuracy, and logits."""

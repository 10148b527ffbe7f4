"""``bench offline``: batches of random prompts of given lengths, timed, with MindIE's figures."""

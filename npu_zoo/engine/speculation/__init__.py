"""Speculative decoding (arXiv:2211.17192): drafts of next tokens, verified in one step."""

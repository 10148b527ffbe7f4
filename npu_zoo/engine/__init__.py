"""The native engine: tokenizer, scheduler, runner and sampler."""

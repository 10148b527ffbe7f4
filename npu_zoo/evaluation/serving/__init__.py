"""A load generator for servers that speak OpenAI's API, and the figures of what it saw."""

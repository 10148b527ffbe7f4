"""The OpenAI-compatible server: a supervisor, an engine process and an HTTP front end."""

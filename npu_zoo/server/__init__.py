"""Serving a model to many clients: a supervisor, the engine in a process of its own, and the front end."""

"""OpenAI's requests and answers as data: what a server and a batch run share. Needs no web framework and no torch."""

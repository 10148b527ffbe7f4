"""Programs that a model wrote: how they are cut out of its answers, run in a sandbox, and counted."""

"""Process groups, ports, rank tables and binding of parallel runs."""

"""Several models in one server: which are loaded, and for how long. Knows no HTTP."""

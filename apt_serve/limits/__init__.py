"""How much each caller may take; knows no HTTP."""

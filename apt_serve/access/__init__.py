"""Who may come in and how much they may take; knows no HTTP."""

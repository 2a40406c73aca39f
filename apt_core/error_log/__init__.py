"""Errors that are kept: written down with where they happened, and counted by their causes."""

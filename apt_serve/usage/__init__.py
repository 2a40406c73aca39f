"""Whose requests took how many tokens, by the hour, in the records."""

"""The ops that processors get a faster version of than the reference."""

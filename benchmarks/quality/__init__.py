"""What a weight precision costs."""

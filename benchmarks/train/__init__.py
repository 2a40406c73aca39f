"""Speed of the trainer and of its parts."""

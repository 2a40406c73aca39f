"""What a run tells of itself: gradients, metrics and a progress bar."""

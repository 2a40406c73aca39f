"""What a precision of weights and KV cache costs."""

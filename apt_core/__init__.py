"""What the server and the trainer must agree on bit for bit: model, checkpoint, tokenizer."""

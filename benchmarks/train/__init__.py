"""Speed of training, beside a plain loop over transformers' model."""

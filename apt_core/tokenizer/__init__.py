"""Text to token ids and back."""

from apt_core.tokenizer.tokenizer import Tokenizer

__all__ = ["Tokenizer"]

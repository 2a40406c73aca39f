"""A tokenizer of bytes and a few files."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from apt_core.tokenizer import HFTokenizer
from apt_core.tokenizer.chat_template import ChatTemplate

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer():
    """One token a byte, 257 ids; 256 is <end>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens(["<end>"])
    return HFTokenizer(rust, chat_template=ChatTemplate(TEMPLATE, special_tokens={}, file="test"), file="test")

"""Chat templates render as transformers renders them, and their faults are put down to whom they belong."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, models

from apt_core.errors import CheckpointError, InvalidRequestError
from apt_core.tokenizer.chat_template import ChatTemplate

CHATML = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{% for message in messages if message.role != 'system' %}
<|im_start|>{{ message.role }}
{{ message.content | trim }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}
"""
LLAMA = """\
{% set loop_messages = messages %}
{% for message in loop_messages %}
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim %}
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
{{ content + eos_token }}
{% endfor %}
"""
ALTERNATING = """\
{{ bos_token }}
{%- for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate') }}
{%- endif %}
{%- if message.role == 'user' %}[INST] {{ message.content }} [/INST]
{%- else %}{% generation %}{{ message.content + eos_token }}{% endgeneration %}{% endif %}
{%- endfor %}
"""
LOOP_CONTROLS = """\
{% for message in messages %}{% if message.role == 'system' %}{% continue %}{% endif %}{{ message | tojson }}
{{ message | tojson(indent=2) }}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}
{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ tools is none }}
"""
DATE = "Today is {{ strftime_now('%Y-%m-%d') }}{{ messages | length }}"
TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "alternating": ALTERNATING, "loops": LOOP_CONTROLS, "date": DATE}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": " Hello <b>& 'you'</b> "}],
    "turns": [
        {"role": "user", "content": "Zażółć 日本 \U0001f600"},
        {"role": "assistant", "content": "{{ not a template }}"},
        {"role": "user", "content": 'quotes " and \\ \n lines'},
    ],
}


def compile_template(source: str) -> ChatTemplate:
    return ChatTemplate(source, special_tokens=TOKENS, file="tokenizer_config.json")


@pytest.fixture(scope="module")
def oracle() -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])), **TOKENS)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_prompts_are_those_of_transformers(
    template: str,
    messages: list[dict[str, Any]],
    add_generation_prompt: bool,
    oracle: transformers.PreTrainedTokenizerFast,
) -> None:
    theirs = oracle.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
    )

    assert compile_template(template).render(messages, add_generation_prompt=add_generation_prompt) == theirs


def test_a_system_message_is_rendered(oracle: transformers.PreTrainedTokenizerFast) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]

    theirs = oracle.apply_chat_template(messages, chat_template=CHATML, tokenize=False, add_generation_prompt=True)

    assert compile_template(CHATML).render(messages, add_generation_prompt=True) == theirs


def test_the_date_is_todays() -> None:
    rendered = compile_template(DATE).render([], add_generation_prompt=False)

    assert rendered.startswith(f"Today is {datetime.now():%Y-}")


def test_a_refusal_of_the_template_is_the_requests_fault() -> None:
    messages = [{"role": "assistant", "content": "I speak first"}]

    with pytest.raises(InvalidRequestError, match="roles must alternate") as caught:
        compile_template(ALTERNATING).render(messages, add_generation_prompt=True)

    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (CHATML, []),
        (LLAMA, [{"content": "x", "role": None}]),
        (ALTERNATING, [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]),
        (ALTERNATING, [{"role": "user", "content": "x"}, {"role": "assistant"}]),
        ("{{ 1 // (messages | length - 1) }}", [{}]),
        ("{{ messages[0].content.nothing.at_all }}", [{"content": "x"}]),
        ("{{ [messages.append(1)] }}", [{}]),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", [{}]),
    ],
)
def test_messages_that_a_template_cannot_work_with_are_the_requests_fault(
    template: str, messages: list[dict[str, Any]]
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        compile_template(template).render(messages, add_generation_prompt=True)

    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "template", ["{% if %}", "{{ open", "{% for x in y %}", "{{ x | no_such_filter }}", "{% nope %}"]
)
def test_a_malformed_template_is_the_checkpoints_fault(template: str) -> None:
    with pytest.raises(CheckpointError, match="malformed") as caught:
        compile_template(template)

    assert (caught.value.file, caught.value.field) == ("tokenizer_config.json", "chat_template")

"""The ranges that the API documents are the ones the engine enforces."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from apt_core.errors import InvalidRequestError
from apt_serve.api.schemas.common import SamplingFields
from apt_serve.engine.sampling_params import SamplingParams

EDGES: dict[str, tuple[Any, ...]] = {
    "n": (0, 1, 128, 129),
    "temperature": (-0.01, 0.0, 2.0, 2.01),
    "top_p": (-0.1, 0.0, 0.01, 1.0, 1.01),
    "top_k": (-2, -1, 0, 10**6),
    "min_p": (-0.01, 0.0, 1.0, 1.01),
    "repetition_penalty": (0.0, 0.01, 100.0, 100.1),
    "presence_penalty": (-2.01, -2.0, 2.0, 2.01),
    "frequency_penalty": (-2.01, -2.0, 2.0, 2.01),
    "min_tokens": (-1, 0, 10),
    "seed": (-(2**63) - 1, -(2**63), 2**63 - 1, 2**63),
    "logit_bias": ({"1": -100.1}, {"1": -100.0}, {"1": 100.0}, {"1": 100.1}),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in EDGES.items() for value in values])
def test_edges_agree(name: str, value: Any) -> None:
    engine_value = {int(token): bias for token, bias in value.items()} if name == "logit_bias" else value
    try:
        SamplingParams(**{name: engine_value})
        is_allowed = True
    except InvalidRequestError as error:
        assert error.param == name
        is_allowed = False
    if is_allowed:
        assert SamplingParams(**SamplingFields(**{name: value}).given()) == SamplingParams(**{name: engine_value})
    else:
        with pytest.raises(ValidationError):
            SamplingFields(**{name: value})


def test_every_sampling_parameter_can_be_asked_for() -> None:
    limits = {"max_tokens", "logprobs", "prompt_logprobs"}  # each endpoint has its own way of saying these
    assert set(SamplingParams.__dataclass_fields__) - limits == set(SamplingFields.model_fields)

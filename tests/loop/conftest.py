"""Set-up that the loop's tests share."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from specdiff import Target
from tests.tiny import FAMILIES, tiny_model


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=FAMILIES)
def model(request) -> PreTrainedModel:
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def target(model) -> Target:
    return Target(model)

# SPDX-License-Identifier: MIT
from __future__ import annotations

import pytest
import torch
from hypothesis import settings

from kpfused import kernels

# Reproducible in continuous integration: the same examples every time, and no deadline on a noisy machine.
settings.register_profile("kpfused", deadline=None, derandomize=True, max_examples=150)
settings.load_profile("kpfused")

# Networks are compared with themselves, compiled: with reduced precision, one algorithm differs from the next.
torch.backends.cudnn.allow_tf32 = False

# A CUDA tensor without CUDA kernels would test the fallback, not the kernels.
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() and kernels.has_kernel("cuda") else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

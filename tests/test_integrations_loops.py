"""Four loops, one problem: masks, averages and weights agree bit for bit, whatever is switched on."""

from __future__ import annotations

import warnings

import pytest
import torch

import lora2fx
from tests import loops
from tests.loops import METHOD, STEPS, Setting, forget

SETTINGS = {
    "accumulation and clipping": Setting(clip=0.5),
    "skipped without a scaler": Setting(clip=0.5, overflow=True),
    "bf16 autocast and checkpointing": Setting(bf16=True, checkpointed=True),
    # accelerate unscales before clipping only with its own float16, which it refuses on a CPU.
    "scaler, unfused": Setting(scaled=True, overflow=True),
    "scaler, fused": Setting(scaled=True, overflow=True, fused=True),
    "compiled": Setting(compiled=True),
}


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    forget()
    yield
    forget()


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_four_loops_are_one(setting, tmp_path):
    model = loops.plain(setting)
    expected = loops.state(model)
    assert model.first.lora2fx_weight.progress.tolist() == [STEPS - setting.overflow, STEPS, int(setting.overflow)]
    found = [name for name in expected if name.endswith("lora2fx_weight.mask")]
    assert sum(int(expected[name].sum()) for name in found) == METHOD.target_r * len(found) == 4
    for loop in (loops.hugging_face, loops.accelerated, loops.lightning):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning|torch.utils.data|accelerate")
            other = loop(setting, tmp_path)
        own = loops.state(other)
        assert own.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(own[name], value), f"{loop.__name__}: {name}"
        forget()
    lora2fx.fold(other)

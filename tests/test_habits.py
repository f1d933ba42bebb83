"""What people expect of any package: a repr that says something, a count of parameters, a version, no noise."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from importlib.metadata import version

import peft
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lora2fx
from lora2fx.methods.lora2_factors import LoRA2Adapter
from tests.adapted import linear_site


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def test_an_adapted_layer_shows_role_rewrite_size_and_what_is_left():
    model = lora2fx.transform(small(), ["0", "2"], lora2fx.LoRA2(r=4, k=3, target_k=2), example_inputs=(X,))
    adapter = model[0].lora2fx_weight
    assert repr(adapter) == "LoRA2Adapter(unknown, activation, 6→8, lambda 4 of 4, columns 3 of 3)"
    adapter.axes()["columns"].mask[1] = False
    assert "columns 2 of 3" in repr(model)


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_a_layer_without_values_has_a_repr_too(kind):
    adapter = LoRA2Adapter(linear_site("up", 6, 8), 4, 3, 1.0, "identity", 0.0)
    if kind == "meta":
        assert "6→8" in repr(copy.deepcopy(adapter).to("meta"))
    else:
        with FakeTensorMode():
            assert "columns 3)" in repr(LoRA2Adapter(linear_site("up", 6, 8), 4, 3, 1.0, "identity", 0.0))
    assert "not installed" in repr(adapter)


def test_trainable_parameters_are_printed_as_peft_prints_them(capsys):
    lora2fx.print_trainable_parameters(lora2fx.transform(small(), ["0", "2"], lora2fx.LoRA(r=2), example_inputs=(X,)))
    own = capsys.readouterr().out
    peft.get_peft_model(small(), peft.LoraConfig(r=2, target_modules=["0", "2"])).print_trainable_parameters()
    assert own == capsys.readouterr().out


def test_a_model_without_parameters_is_no_division_by_zero(capsys):
    lora2fx.print_trainable_parameters(nn.ReLU())
    assert capsys.readouterr().out == "trainable params: 0 || all params: 0 || trainable%: 0.0000\n"


def test_the_version_is_the_distributions():
    assert lora2fx.__version__ == version("lora2fx")


def test_importing_is_quiet_quick_to_read_and_leaves_logging_alone():
    """Neither transformers nor onnx is imported before it is needed."""
    code = (
        "import sys, logging, lora2fx;"
        "heavy = {'transformers', 'onnx', 'onnxruntime', 'peft', 'sklearn', 'accelerate', 'lightning'};"
        "print(sorted(heavy & set(sys.modules)), logging.getLogger().handlers)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] []"
    assert done.stderr == ""
    assert not logging.getLogger("lora2fx").handlers

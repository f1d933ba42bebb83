"""The HTTP server of the example: each request gets its adapter's answer, a wrong one a sentence."""

from __future__ import annotations

import json
import runpy
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

EXAMPLES = Path(__file__).parents[1] / "examples"
MULTI = runpy.run_path(str(EXAMPLES / "export_onnx_multi.py"), run_name="example")
SERVE = runpy.run_path(str(EXAMPLES / "serve_adapters.py"), run_name="example")
X = torch.randn(3, 16, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    MULTI["main"](folder)
    with SERVE["server"](folder, 0) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()
        thread.join()


def ask(address, body):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(address, data), timeout=30) as answer:
        return json.load(answer)


def test_each_request_gets_its_adapter(address):
    with urllib.request.urlopen(address, timeout=30) as answer:
        assert json.load(answer) == {"adapters": ["small", "wide"]}
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    models = {
        None: MULTI["base"](),
        "wide": MULTI["trained"](["0", "2"], 12, 1.0, x),
        "small": MULTI["trained"](["2", "4"], 2, -1.0, x),
    }
    for name in ("wide", None, "small", "wide"):
        found = ask(address, {"adapter": name, "inputs": {"input": X.tolist()}})["output"]
        with torch.no_grad():
            np.testing.assert_allclose(found, models[name](X).numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        {"inputs": 3},
        {"adapter": "nobody", "inputs": {"input": X.tolist()}},
        {"inputs": {"other": X.tolist()}},
    ],
    ids=["empty", "no JSON", "no inputs", "no such adapter", "no such input"],
)
def test_a_wrong_request_is_answered_in_a_sentence(address, body):
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(address, body)
    assert refused.value.code == 400
    assert json.load(refused.value)["error"]
    assert ask(address, {"inputs": {"input": X.tolist()}})["output"]

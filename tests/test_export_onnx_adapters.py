"""`.onnx_adapter` files: what ONNX Runtime writes is read; what is damaged raises `FormatError` and nothing else."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest

from lora2fx.errors import FormatError
from lora2fx.exporters.onnx_adapters import payload_digest, read_adapter, version_of, write_adapter

onnxruntime = pytest.importorskip("onnxruntime")


def parameters() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "a.weight.A": generator.standard_normal((5, 3)).astype(np.float32),
        "a.weight.B": generator.standard_normal((3, 4)).astype(np.float32),
        "empty": np.zeros((4, 0), np.float32),
        "half": generator.standard_normal((2, 2, 2)).astype(np.float16),
        "naïve.weight": np.ones(1, np.float32),
    }


@pytest.fixture
def written(tmp_path):
    write_adapter(tmp_path / "a.onnx_adapter", parameters(), 77)
    return tmp_path / "a.onnx_adapter"


def test_what_is_written_reads_back_as_onnxruntime_reads_it(written):
    found = read_adapter(written)
    theirs = onnxruntime.AdapterFormat.read_adapter(str(written))
    assert found.model_version == theirs.get_model_version() == 77
    assert found.digest == theirs.get_adapter_version() == payload_digest(parameters(), 77)
    values = theirs.get_parameters()
    assert found.parameters.keys() == values.keys() == parameters().keys()
    for name, value in parameters().items():
        assert found.parameters[name].dtype == value.dtype
        np.testing.assert_array_equal(found.parameters[name], value)
        np.testing.assert_array_equal(values[name].numpy(), value)


def is_refused(file, original) -> bool:
    """Whether a damaged file is refused; one that isn't must hold what the original does (padding was hit)."""
    try:
        found = read_adapter(file)
    except FormatError:
        return True
    assert (found.digest, found.model_version) == (original.digest, original.model_version)
    assert found.parameters.keys() == original.parameters.keys()
    for name, value in original.parameters.items():
        assert found.parameters[name].tobytes() == value.tobytes()
    return False


def test_every_flipped_bit_is_noticed_or_without_effect(written, tmp_path):
    content, original = written.read_bytes(), read_adapter(written)
    file, refused, places = (
        tmp_path / "b.onnx_adapter",
        0,
        random.Random(1).sample(range(8 * written.stat().st_size), 1500),
    )
    for place in places:
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        file.write_bytes(damaged)
        refused += is_refused(file, original)
    assert refused > 1000


def test_files_cut_spliced_or_made_up_are_refused(written, tmp_path):
    content, file = written.read_bytes(), tmp_path / "b.onnx_adapter"
    chance = random.Random(2)
    wrong = [content[:size] for size in range(0, len(content) - 4, 7)]
    for _ in range(500):
        cut, length = chance.randrange(len(content)), chance.randrange(1, 40)
        wrong.append(content[:cut] + chance.randbytes(length) + content[cut + length :])
    wrong += [content[:8] + chance.randbytes(200) for _ in range(200)]
    refused = 0
    for made in wrong:
        file.write_bytes(made)
        refused += is_refused(file, read_adapter(written))
    assert refused > len(wrong) - 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: b"PK" + content[2:6] + b"zip", "doesn't begin as one"),
        (lambda content: struct.pack("<I", 4000) + content[4:], "points to byte"),
        (lambda content: b"", "doesn't begin as one"),
    ],
)
def test_what_is_wrong_is_said(written, change, message):
    written.write_bytes(change(written.read_bytes()))
    with pytest.raises(FormatError, match=message):
        read_adapter(written)


def test_files_of_others_and_bad_values_are_refused(tmp_path):
    file = tmp_path / "b.onnx_adapter"
    cases = {
        "hold|digest": {"a": np.ones((2, 2), np.float32)},
        "not finite": {"a": np.array([1.0, np.nan], np.float32)},
        "dtype 7, not float32 or float16": {"a": np.ones(2, np.int64)},
        "holds no parameter": {},
    }
    for message, values in cases.items():
        made = onnxruntime.AdapterFormat()
        made.set_adapter_version(1)
        made.set_parameters({n: onnxruntime.OrtValue.ortvalue_from_numpy(v) for n, v in values.items()})
        made.export_adapter(str(file))
        with pytest.raises(FormatError, match=message):
            read_adapter(file)
    with pytest.raises(FormatError, match="can't be read: No such file"):
        read_adapter(tmp_path / "none.onnx_adapter")
    with pytest.raises(FormatError, match="can't be read"):
        read_adapter(tmp_path)


def test_a_version_fits_the_format():
    assert version_of("0" * 64) == 1
    assert 0 < version_of("f" * 64) < 2**31

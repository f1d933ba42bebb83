"""Random damage to saved files: refused with lora2fx's own errors, the model untouched, whatever was hit."""

import json
import random
import warnings

import pytest

from lora2fx.errors import Lora2fxError
from lora2fx.storage import load, save
from tests.programs import Small, states
from tests.test_storage import reseal, rewrite_payload, trained

VALUES = [None, True, 0, -1, 2, 10**9, 10**20, 1.5, "", "x", "linear.weight", "../x", "0" * 64, [], [[]], {}, [0, 0]]
BYTES = [b"9" * 30, b"-1", b"null", b"true", b"[]", b"{}", b"1e999", b"\\u0000"]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    save(trained().model, folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def damaged(data, rng):
    """A few bits flipped, bytes cut out, copied or replaced."""
    damage = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, other = rng.randrange(len(damage)), rng.randrange(len(damage))
        match rng.randrange(4):
            case 0:
                damage[at] ^= 1 << rng.randrange(8)
            case 1:
                del damage[at : at + rng.randint(1, 20)]
            case 2:
                damage[at:at] = damage[other : other + rng.randint(1, 30)]
            case _:
                damage[at : at + 1] = rng.choice(BYTES)
    return bytes(damage)


def places(value, path=()):
    """Every place within JSON, but the whole."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def altered(manifest, rng):
    """One place set to another value; the place and both values' texts tell whether anything changed."""
    *path, last = rng.choice(list(places(manifest)))
    for key in path:
        manifest = manifest[key]
    manifest[last] = rng.choice(VALUES)


def refuse_or_keep(folder):
    """Whether the files are refused; a refused file leaves the model as it was."""
    model = Small()
    before = states(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(model, folder)
    except Lora2fxError:
        assert states(model) == before
        assert "_lora2fx" not in vars(model)
        return True
    return False


@pytest.mark.parametrize("seed", range(120))
def test_damaged_bytes_are_refused(tmp_path, good, seed):
    rng = random.Random(seed)
    name = rng.choice(sorted(good))
    files = good | {name: damaged(good[name], rng)}
    for path, data in files.items():
        (tmp_path / path).write_bytes(data)
    same = name.endswith("json") and _reads_alike(files[name], good[name])
    assert refuse_or_keep(tmp_path) or same or files == good


def _reads_alike(data, other):
    try:
        return json.loads(data) == json.loads(other)
    except ValueError:
        return False


@pytest.mark.parametrize("seed", range(120))
def test_a_damaged_header_with_right_digests_raises_nothing_foreign(tmp_path, good, seed):
    rng = random.Random(seed)
    (tmp_path / "adapter.json").write_bytes(good["adapter.json"])
    data = good["adapter.safetensors"]
    (tmp_path / "adapter.safetensors").write_bytes(damaged(data[:4000], rng) + data[4000:])
    reseal(tmp_path)
    refuse_or_keep(tmp_path)


@pytest.mark.parametrize("seed", range(160))
def test_an_altered_manifest_with_right_digests_raises_nothing_foreign(tmp_path, good, seed):
    rng = random.Random(seed)
    manifest = json.loads(good["adapter.json"])
    altered(manifest, rng)
    (tmp_path / "adapter.json").write_text(json.dumps(manifest))
    (tmp_path / "adapter.safetensors").write_bytes(good["adapter.safetensors"])
    if isinstance(manifest, dict):
        rewrite_payload(tmp_path, lambda tensors: None)
    refuse_or_keep(tmp_path)

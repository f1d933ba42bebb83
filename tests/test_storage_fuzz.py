"""Random damage to saved files: refused with one kind of error, cheaply, the model untouched, whatever was hit."""

import json
import random
import warnings

import pytest

from lora2fx.errors import FormatError
from lora2fx.storage import load, save
from tests.bounds import bounded
from tests.fuzzing import SEEDS, damaged, placed, places, swapped
from tests.programs import Small, states
from tests.test_storage import reseal, rewrite_payload, trained

PARTS = 4


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    save(trained().model, folder)
    load(Small(), folder)  # so that what Python loads on first use is in no test's memory
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refuse_or_keep(folder):
    """Whether the files are refused; a refused file leaves the model as it was."""
    model = Small()
    before = states(model)
    with bounded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            load(model, folder)
        except FormatError:
            assert states(model) == before
            assert "_lora2fx" not in vars(model)
            return True
    return False


def seeds(part):
    return range(part, SEEDS, PARTS)


def write(folder, files):
    for path, data in files.items():
        (folder / path).write_bytes(data)


def _reads_alike(data, other):
    try:
        return json.loads(data) == json.loads(other)
    except ValueError:
        return False


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", ["adapter.json", "adapter.safetensors"])
def test_damaged_bytes_are_refused(tmp_path, good, name, part):
    for seed in seeds(part):
        files = good | {name: damaged(good[name], random.Random(f"bytes {name} {seed}"))}
        write(tmp_path, files)
        same = name.endswith("json") and _reads_alike(files[name], good[name])
        assert refuse_or_keep(tmp_path) or same or files == good


@pytest.mark.parametrize("part", range(PARTS))
def test_a_damaged_header_with_right_digests_raises_nothing_foreign(tmp_path, good, part):
    for seed in seeds(part):
        data = good["adapter.safetensors"]
        damage = damaged(data[:4000], random.Random(f"header {seed}")) + data[4000:]
        write(tmp_path, good | {"adapter.safetensors": damage})
        reseal(tmp_path)
        refuse_or_keep(tmp_path)


@pytest.mark.parametrize("part", range(PARTS))
def test_an_altered_manifest_with_right_digests_raises_nothing_foreign(tmp_path, good, part):
    for seed in seeds(part):
        rng, manifest = random.Random(f"manifest {seed}"), json.loads(good["adapter.json"])
        placed(manifest, rng.choice(list(places(manifest))), rng)
        write(tmp_path, good | {"adapter.json": json.dumps(manifest).encode()})
        rewrite_payload(tmp_path, lambda tensors: None)
        refuse_or_keep(tmp_path)


@pytest.mark.parametrize("part", range(PARTS))
def test_altered_tensors_with_right_digests_raise_nothing_foreign(tmp_path, good, part):
    for seed in seeds(part):
        rng = random.Random(f"tensors {seed}")
        write(tmp_path, good)
        rewrite_payload(tmp_path, lambda tensors, rng=rng: swapped(tensors, rng))
        refuse_or_keep(tmp_path)

"""PEFT folders from strangers: refused with one kind of error, cheaply, and the model stays bit for bit as it was."""

from __future__ import annotations

import json
import os
import pickle
import random
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora2fx
from lora2fx.errors import FormatError
from lora2fx.storage_peft_config import CONFIG
from lora2fx.storage_peft_tensors import WEIGHTS
from tests.bounds import bounded
from tests.fuzzing import SEEDS, damaged, placed, places, swapped
from tests.peft_folders import IDS, Net, written
from tests.programs import states

peft = pytest.importorskip("peft")

PRE = "base_model.model."
A, B, HEAD = f"{PRE}fc.lora_A.weight", f"{PRE}fc.lora_B.weight", f"{PRE}head.weight"
WORDS = f"{PRE}words.lora_embedding_A"


def files_of(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora2fx.load(
            Net(), folder, example_inputs=(IDS,)
        )  # so that what Python loads on first use is in no test's memory
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["fc", "words", "conv"], modules_to_save=["head"], rank_pattern={"^fc": 2}
    )
    written(Net(), config, folder)
    return files_of(folder)


@pytest.fixture(scope="module")
def adalora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adalora")
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["fc"])
    model = written(Net(), config, folder)
    model.peft_config["default"].rank_pattern = {
        "fc.lora_E": [True, False, True, False],
        "inner.fc.lora_E": [True, True, True, True],
    }
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    return files_of(folder)


def put(name, value):
    """A change of one entry of the config; a value that is a function gets the old one."""

    def change(folder):
        path = folder / CONFIG
        config = json.loads(path.read_text())
        config[name] = value(config.get(name)) if callable(value) else value
        path.write_text(json.dumps(config))

    return change


def drop(name):
    def change(folder):
        config = json.loads((folder / CONFIG).read_text())
        del config[name]
        (folder / CONFIG).write_text(json.dumps(config))

    return change


def tensor(name, make):
    """A change of one tensor; None takes it away."""

    def change(folder):
        tensors = load_file(folder / WEIGHTS)
        made = make(tensors.get(name))
        tensors = {key: value for key, value in tensors.items() if key != name}
        save_file(tensors if made is None else {**tensors, name: made.contiguous()}, folder / WEIGHTS)

    return change


def raw(name, function):
    def change(folder):
        (folder / name).write_bytes(function((folder / name).read_bytes()))

    return change


def header(function):
    """A change of the header's JSON, its length kept right."""

    def change(folder):
        data = (folder / WEIGHTS).read_bytes()
        size = int.from_bytes(data[:8], "little")
        found = function(json.loads(data[8 : 8 + size]))
        text = found if isinstance(found, bytes) else json.dumps(found).encode()
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    return change


def entry(name, **values):
    return header(lambda found: {**found, name: {**found[name], **values}})


def linked(name):
    def change(folder):
        elsewhere = folder.parent / f"elsewhere-{name}"
        (folder / name).rename(elsewhere)
        (folder / name).symlink_to(elsewhere)

    return change


def piped(name):
    def change(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def made_folder(name):
    def change(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def poisoned(value):
    def change(found):
        found = found.clone()
        found.view(-1)[-1] = value
        return found

    return change


def pickled(folder):
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"x": 1}))


MALFORMED = {
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), r"adapter_model\.safetensors can't be read: No such"),
    "weights as a pickle": (pickled, r"adapter_model\.safetensors can't be read: No such"),
    "config a link": (linked(CONFIG), r"adapter_config\.json is a symbolic link"),
    "weights a link": (linked(WEIGHTS), r"adapter_model\.safetensors is a symbolic link"),
    "config a pipe": (piped(CONFIG), r"adapter_config\.json is no regular file"),
    "weights a pipe": (piped(WEIGHTS), r"adapter_model\.safetensors is no regular file"),
    "weights a folder": (made_folder(WEIGHTS), r"adapter_model\.safetensors (is no regular file|can't be read)"),
    "config cut short": (raw(CONFIG, lambda data: data[:-30]), r"no valid JSON"),
    "config not UTF-8": (raw(CONFIG, lambda data: b"\xff" + data), r"no valid JSON"),
    "config a list": (raw(CONFIG, lambda data: b"[1]"), r"the file is \[1\], not an object"),
    "config nested deeply": (raw(CONFIG, lambda data: b"[" * 100_000), r"no valid JSON"),
    "config of many values": (raw(CONFIG, lambda data: b"[" + b"[]," * 300_000 + b"0]"), r"more than 262144 values"),
    "config of many bytes": (raw(CONFIG, lambda data: b'"' + b"x" * 2**24 + b'"'), r"bytes where at most"),
    "config with a key twice": (raw(CONFIG, lambda data: b'{"r": 3,' + data.strip()[1:]), r"a key is there twice"),
    "NaN in the config": (put("lora_alpha", float("nan")), r"NaN is no number of JSON"),
    "no peft_type": (drop("peft_type"), r"peft_type is 'None'; lora2fx reads LORA and ADALORA"),
    "LoHa": (put("peft_type", "LOHA"), r"peft_type is 'LOHA'.*merge_and_unload"),
    "prefix tuning": (put("peft_type", "PREFIX_TUNING"), r"peft_type is 'PREFIX_TUNING'"),
    "peft_type no text": (put("peft_type", ["LORA"]), r"peft_type is"),
    "DoRA": (put("use_dora", True), r"'use_dora' is on: DoRA rescales whole weights"),
    "DoRA by its tensors": (
        tensor(f"{PRE}fc.lora_magnitude_vector", lambda _: torch.ones(8)),
        r"lora_magnitude_vector'.*DoRA",
    ),
    "QA-LoRA": (put("use_qalora", True), r"'use_qalora' is on: lora2fx does not know"),
    "lora_bias": (put("lora_bias", True), r"'lora_bias' is on: its lora_B has a bias"),
    "a bias by its tensors": (tensor(f"{PRE}fc.lora_B.bias", lambda _: torch.ones(8)), r"is no factor of plain LoRA"),
    "trained tokens": (put("trainable_token_indices", [1]), r"it trains single rows of the embedding"),
    "raw parameters": (put("target_parameters", ["experts"]), r"bare parameters"),
    "repeated layers": (put("layer_replication", [[0, 2]]), r"repeats the base model's layers"),
    "a field of tomorrow": (put("use_magic", {"x": 1}), r"'use_magic' is on: lora2fx does not know"),
    "code": (put("auto_map", {"AutoModel": "evil.Evil"}), r"'auto_map' is on"),
    "PiSSA": (put("init_lora_weights", "pissa"), r"init_lora_weights is 'pissa', which changes the base weights"),
    "LoftQ": (put("init_lora_weights", "loftq"), r"init_lora_weights is 'loftq'"),
    "an odd start": (put("init_lora_weights", {}), r"init_lora_weights is"),
    "a rank of 0": (put("r", 0), r"r is 0, not a whole number of at least 1"),
    "a negative rank": (put("r", -3), r"r is -3"),
    "a rank of half": (put("r", 2.5), r"r is 2\.5"),
    "a rank as text": (put("r", "3"), r"r is '3'"),
    "a true rank": (put("r", True), r"r is True"),
    "a rank of a trillion": (put("r", 10**12), r"r is 1000000000000"),
    "another rank": (
        put("r", 4),
        r"conv\.lora_A\.weight has the shape \(3, 8, 3\) in the file; it must be \(4, 8, 3\)",
    ),
    "no rank, 8 by default": (drop("r"), r"it must be \(8, 8, 3\)"),
    "an alpha as text": (put("lora_alpha", "16"), r"lora_alpha is '16', not a number"),
    "an alpha of 0": (put("lora_alpha", 0), r"its hyperparameters can't work: lora_alpha=0"),
    "a negative alpha": (put("lora_alpha", -2), r"hyperparameters can't work"),
    "an alpha beyond floats": (put("lora_alpha", 10**400), r"lora_alpha is"),
    "a dropout of 2": (put("lora_dropout", 2), r"lora_dropout is 2, not a number of at least 0 and below 1"),
    "rslora as text": (put("use_rslora", "no"), r"use_rslora is 'no', not true or false"),
    "another bias": (put("bias", "some"), r"bias is 'some'"),
    "a bias list": (put("bias", ["none"]), r"bias is"),
    "rank_pattern a list": (put("rank_pattern", [["fc", 2]]), r"rank_pattern is .* not an object"),
    "a pattern that runs for hours": (
        put("rank_pattern", {"(a+)+$": 2}),
        r"rank_pattern has the key .*a regular expression\. lora2fx runs none",
    ),
    "a pattern of any name": (put("alpha_pattern", {".*": 2}), r"alpha_pattern has the key '\.\*'"),
    "a pattern of digits": (put("alpha_pattern", {r"layer\d": 2}), r"a regular expression"),
    "an empty pattern": (put("rank_pattern", {"": 2}), r"a regular expression"),
    "a pattern of another rank": (put("rank_pattern", {"^fc": 5}), r"fc\.lora_A\.weight has the shape \(2, 6\)"),
    "a pattern of no rank": (put("rank_pattern", {"^fc": None}), r"rank_pattern\['\^fc'\] is None"),
    "a pattern of no alpha": (put("alpha_pattern", {"fc": "2"}), r"alpha_pattern\['fc'\] is '2'"),
    "targets a number": (put("target_modules", 3), r"target_modules is 3"),
    "targets of numbers": (put("target_modules", [1]), r"target_modules is \[1\]"),
    "factors that no target names": (
        put("target_modules", ["words", "conv"]),
        r"fc, which target_modules does not name",
    ),
    "a target without factors": (
        put("target_modules", lambda names: [*names, "image"]),
        r"names 'image', and the file has no LoRA factors for image",
    ),
    "modules to save a text": (put("modules_to_save", "head"), r"modules_to_save is 'head'"),
    "an adapted module to save": (
        put("modules_to_save", ["head", "conv"]),
        r"conv is both in modules_to_save and adap",
    ),
    "a head that is missing": (put("modules_to_save", ["head", "image"]), r"lacks 'image\.bias'"),
    "weights empty": (raw(WEIGHTS, lambda data: b""), r"can't be read|no valid"),
    "weights cut short": (raw(WEIGHTS, lambda data: data[:-4]), r"was cut short or changed"),
    "weights longer": (raw(WEIGHTS, lambda data: data + b"0000"), r"was cut short or changed"),
    "a header without end": (raw(WEIGHTS, lambda data: b"\xff" * 8 + data[8:]), r"its header is too large"),
    "a header of many values": (header(lambda found: b"[" + b"[]," * 300_000 + b"0]"), r"its header is too large"),
    "a header that is a list": (header(lambda found: b"[]"), r"its header is no object"),
    "a header cut short": (header(lambda found: json.dumps(found).encode()[:-9]), r"no valid JSON"),
    "an entry that is a number": (header(lambda found: {**found, A: 3}), r"entry of .* can't be read"),
    "a dtype of nowhere": (entry(A, dtype="F1"), r"entry of .* can't be read"),
    "a negative shape": (entry(A, shape=[-2, 6]), r"entry of .* can't be read"),
    "a shape beyond memory": (entry(A, shape=[2**62, 2**62]), r"can't be read|was cut short or changed"),
    "a shape of an exabyte": (entry(A, shape=[2**40, 6]), r"was cut short or changed"),
    "offsets outside": (entry(A, data_offsets=[0, 2**50]), r"no valid safetensors file"),
    "offsets that overlap": (header(lambda f: {**f, A: {**f[A], "data_offsets": f[B]["data_offsets"]}}), r"no valid"),
    "metadata of numbers": (header(lambda found: {**found, "__metadata__": {"x": 1}}), r"no valid safetensors file"),
    "nothing in it": (lambda folder: save_file({}, folder / WEIGHTS), r"holds no LORA factors"),
    "names without a prefix": (tensor("fc.lora_A.weight", lambda _: torch.ones(1)), r"has an unknown 'fc\.lora_A"),
    "an unknown tensor": (tensor(f"{PRE}elsewhere", lambda _: torch.ones(1)), r"has an unknown 'elsewhere'"),
    "a module of another model": (
        tensor(f"{PRE}layers.0.fc.lora_A.weight", lambda _: torch.ones(3, 6)),
        r"a module 'layers\.0\.fc', which Net does not have",
    ),
    "a path out of the model": (
        tensor(f"{PRE}../../fc.lora_A.weight", lambda _: torch.ones(2, 6)),
        r"which Net does not have|does not name",
    ),
    "the model itself": (tensor(f"{PRE}.lora_A.weight", lambda _: torch.ones(2, 6)), r"does not name|does not have"),
    "a module that is no layer": (
        lambda folder: [
            put("target_modules", lambda names: [*names, "inner"])(folder),
            tensor(f"{PRE}inner.lora_A.weight", lambda _: torch.ones(3, 6))(folder),
        ],
        r"inner is a Sequential here, for which PEFT has no such LORA layer",
    ),
    "a base weight": (tensor(f"{PRE}fc.weight", lambda _: torch.zeros(8, 6)), r"fc\.weight, a weight of the base"),
    "a base bias": (tensor(f"{PRE}fc.bias", lambda _: torch.zeros(8)), r"fc\.bias, a weight of the base model"),
    "a factor missing": (tensor(B, lambda _: None), r"fc: the file lacks, or has too much: B"),
    "an embedding's factor for a linear": (
        tensor(f"{PRE}fc.lora_embedding_A", lambda _: torch.ones(2, 6)),
        r"fc is a Linear here|lacks, or has too much",
    ),
    "AdaLoRA's factor": (tensor(f"{PRE}fc.lora_E", lambda _: torch.ones(2, 1)), r"no factor of plain LoRA"),
    "a head's tensor missing": (tensor(f"{PRE}head.bias", lambda _: None), r"lacks 'head\.bias'"),
    "a head of another shape": (tensor(HEAD, lambda t: t[:1]), r"head\.weight has the shape \(1, 12\)"),
    "a head of integers": (tensor(HEAD, lambda t: t.to(torch.int32)), r"head\.weight is torch\.int32"),
    "a head with NaN": (tensor(HEAD, poisoned(float("nan"))), r"head\.weight holds NaN or infinity"),
    "a factor transposed": (tensor(A, lambda t: t.t()), r"lora_A\.weight has the shape \(6, 2\)"),
    "a factor of one dimension": (tensor(A, lambda t: t.flatten()), r"has the shape \(12,\)"),
    "a factor of integers": (tensor(A, lambda t: t.to(torch.int8)), r"not of one float dtype"),
    "factors of two dtypes": (tensor(A, lambda t: t.half()), r"not of one float dtype"),
    "a factor with NaN": (tensor(A, poisoned(float("nan"))), r"lora_A\.weight holds NaN or infinity"),
    "a factor with infinity": (tensor(B, poisoned(float("inf"))), r"lora_B\.weight holds NaN or infinity"),
    "a convolution's kernel": (
        tensor(f"{PRE}conv.lora_A.weight", lambda t: t[..., :1]),
        r"conv\.lora_A\.weight has the shape \(3, 8, 1\)",
    ),
    "padding that moves": (
        tensor(WORDS, lambda t: t.index_fill(1, torch.tensor([0]), 1.0)),
        r"words: the adapter changes the embedding's padding row 0",
    ),
}
ADALORA = {
    "init_r as text": (put("init_r", "4"), r"init_r is '4'"),
    "another init_r": (put("init_r", 5), r"true or false for each of 5 ranks"),
    "numbers for flags": (put("rank_pattern", {"fc.lora_E": [1, 0, 1, 0]}), r"true or false for each of 4 ranks"),
    "a mask too short": (put("rank_pattern", {"fc.lora_E": [True]}), r"true or false for each of 4 ranks"),
    "ranks as numbers": (put("rank_pattern", {"fc.lora_E": 2}), r"true or false for each of 4 ranks"),
    "a pattern of another factor": (put("rank_pattern", {"fc.lora_A": [True] * 4}), r"of a lora_E"),
    "a pattern of another module": (put("rank_pattern", {"head.lora_E": [True] * 4}), r"names 'head'"),
    "no pattern": (put("rank_pattern", None), r"has the shape \(2, 6\) in the file; it must be \(4, 6\)"),
    "nothing left": (
        lambda folder: [
            put("rank_pattern", {f"{path}.lora_E": [False] * 4 for path in ("fc", "inner.fc")})(folder),
            *(
                tensor(f"{PRE}{path}.lora_{f}", lambda t, dim=dim: t.narrow(dim, 0, 0))(folder)
                for path in ("fc", "inner.fc")
                for f, dim in (("A", 0), ("E", 0), ("B", 1))
            ),
        ],
        r"every LoRA of the folder has rank 0",
    ),
    "λ missing": (tensor(f"{PRE}fc.lora_E", lambda _: None), r"lacks, or has too much: E"),
    "λ with NaN": (tensor(f"{PRE}fc.lora_E", poisoned(float("nan"))), r"lora_E holds NaN or infinity"),
    "LoRA's names": (put("peft_type", "LORA"), r"rank_pattern\['fc\.lora_E'\]|holds no LORA factors"),
    "a Conv1d": (
        lambda folder: [
            put("target_modules", ["fc", "conv"])(folder),
            *(
                tensor(f"{PRE}conv.lora_{f}", lambda _, s=s: torch.ones(s))(folder)
                for f, s in (("A", (4, 24)), ("E", (4, 1)), ("B", (8, 4)))
            ),
        ],
        r"conv is a Conv1d here, for which PEFT has no such ADALORA layer",
    ),
}


def refused(folder, files, change, message):
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    change(folder)
    model = Net()
    before, classes = states(model), [type(module) for module in model.modules()]
    with bounded(), pytest.raises(FormatError, match=message):
        lora2fx.load(model, folder, example_inputs=(IDS,))
    assert states(model) == before
    assert [type(module) for module in model.modules()] == classes
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert "_lora2fx" not in vars(model)


@pytest.mark.parametrize(("change", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_lora_that_is_wrong_is_refused_and_the_model_stays(tmp_path, lora, change, message):
    refused(tmp_path / "adapter", lora, change, message)


@pytest.mark.parametrize(("change", "message"), ADALORA.values(), ids=ADALORA.keys())
def test_an_adalora_that_is_wrong_is_refused_and_the_model_stays(tmp_path, adalora, change, message):
    refused(tmp_path / "adapter", adalora, change, message)


def test_there_are_eighty_cases():
    assert len(MALFORMED) + len(ADALORA) >= 80


def fuzzed(folder, files):
    """Loaded or refused, the model then untouched, and no other error."""
    for name, data in files.items():
        (folder / name).write_bytes(data)
    model = Net()
    before = states(model)
    with bounded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            lora2fx.load(model, folder)
        except FormatError:
            assert states(model) == before
            assert "_lora2fx" not in vars(model)


@pytest.mark.parametrize("kind", ["lora", "adalora"])
@pytest.mark.parametrize("part", range(4))
def test_damaged_files_raise_nothing_foreign(tmp_path, kind, part, request):
    files = request.getfixturevalue(kind)
    for seed in range(part, SEEDS, 4):
        rng = random.Random(f"bytes {kind} {seed}")
        name = rng.choice([CONFIG, WEIGHTS])
        head = 1200 if name == WEIGHTS and rng.random() < 0.8 else len(files[name])
        damage = damaged(files[name][:head], rng) + files[name][head:]
        fuzzed(tmp_path, files | {name: damage})


@pytest.mark.parametrize("kind", ["lora", "adalora"])
@pytest.mark.parametrize("part", range(4))
def test_altered_entries_raise_nothing_foreign(tmp_path, kind, part, request):
    files = request.getfixturevalue(kind)
    size = int.from_bytes(files[WEIGHTS][:8], "little")
    for seed in range(part, SEEDS, 4):
        rng = random.Random(f"entries {kind} {seed}")
        config, start = json.loads(files[CONFIG]), json.loads(files[WEIGHTS][8 : 8 + size])
        found = rng.choice([config, start])
        placed(found, rng.choice(list(places(found))), rng)
        text = json.dumps(start).encode()
        weights = len(text).to_bytes(8, "little") + text + files[WEIGHTS][8 + size :]
        fuzzed(tmp_path, {CONFIG: json.dumps(config).encode(), WEIGHTS: weights})


@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_tensors_of_each_others_names_raise_nothing_foreign(tmp_path, kind, request):
    files = request.getfixturevalue(kind)
    for seed in range(SEEDS // 2):
        rng = random.Random(f"tensors {kind} {seed}")
        (tmp_path / WEIGHTS).write_bytes(files[WEIGHTS])
        tensors = load_file(tmp_path / WEIGHTS)
        swapped(tensors, rng)
        save_file(tensors, tmp_path / WEIGHTS)
        fuzzed(tmp_path, files | {WEIGHTS: (tmp_path / WEIGHTS).read_bytes()})

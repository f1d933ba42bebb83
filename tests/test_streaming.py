"""Folding folders tensor by tensor: the bits of the in-memory fold, whatever is interrupted, tied, sharded or wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lora2fx
from lora2fx.errors import AdapterError, ExportError, FormatError, Lora2fxWarning, MethodError, ScheduleError
from lora2fx.exporters import streaming as writing
from lora2fx.exporters.shards import Stored
from lora2fx.methods.lora import LoRA
from lora2fx.methods.lora2 import LoRA2
from lora2fx.program import program_of
from lora2fx.streaming import fold_checkpoint
from tests.zoo import ZOO

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:fold. rounding to the weights' dtype:lora2fx.Lora2fxWarning")


def randomise(model, size=0.1):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for adapter in program_of(model, "test").adapters.values():
            for parameter in adapter.parameters():
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return model


def prepared(folder, name, targets, dtype=torch.float32, shards="15KB", method=None, **options):
    """A base folder, an adapter folder of it, and the base model's class."""
    model = ZOO[name].build().to(dtype)
    model.save_pretrained(folder / "base", max_shard_size=shards)
    (folder / "base" / "tokenizer.json").write_text("{}")
    lora2fx.transform(model, targets, LoRA2(r=4, k=3) if method is None else method, verify=False, **options)
    lora2fx.save(randomise(model), folder / "adapter")
    return type(model)


def in_memory(folder, kind, **options):
    """What `load` and `fold` make of the same two folders."""
    model = lora2fx.load(kind.from_pretrained(folder / "base", dtype="auto"), folder / "adapter")
    lora2fx.fold(model, **options)
    return model


def tensors_of(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def same_bits(own, other):
    assert own.keys() == other.keys()
    for name, value in own.items():
        assert value.dtype == other[name].dtype
        assert torch.equal(value.flatten().view(torch.uint8), other[name].detach().flatten().view(torch.uint8)), name


CASES = {
    "llama in bfloat16": ("llama", ["attention", "ffn"], torch.bfloat16),
    "fused GPT-2": ("gpt2", ["query", "value", "ffn"], torch.float32),
    "BART in float16": ("bart", ["query", "ffn"], torch.float16),
    "bert and its head": ("bert", ["query", "ffn", "bert.embeddings.word_embeddings"], torch.float32),
}


@pytest.mark.parametrize("rounding", ["nearest", "adapter", "stochastic"])
@pytest.mark.parametrize("case", CASES)
def test_the_merged_folder_is_the_in_memory_fold_bit_for_bit(tmp_path, case, rounding):
    name, targets, dtype = CASES[case]
    if rounding != "nearest" and dtype == torch.float32:
        pytest.skip("float32 rounds to nearest whatever is asked")
    kind = prepared(tmp_path, name, targets, dtype)
    report = fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "new" / "out", rounding=rounding)
    wanted = in_memory(tmp_path, kind, rounding=rounding)
    wanted.save_pretrained(tmp_path / "wanted", max_shard_size="15KB")
    same_bits(tensors_of(tmp_path / "new" / "out"), tensors_of(tmp_path / "wanted"))
    loaded = kind.from_pretrained(tmp_path / "new" / "out", dtype="auto")
    same_bits(dict(loaded.state_dict()), dict(wanted.state_dict()))
    assert len(report.details["shards"]) > 1
    assert report.details["copied"] == sorted({"config.json", "tokenizer.json", *report.details["copied"]})
    assert not report.details["resumed"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_the_report_is_the_folds_own(tmp_path):
    kind = prepared(tmp_path, "llama", ["attention"], torch.bfloat16)
    found = fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    model = lora2fx.load(kind.from_pretrained(tmp_path / "base", dtype="auto"), tmp_path / "adapter")
    wanted = lora2fx.fold(model)
    assert list(map(dict, found.sites)) == list(map(dict, wanted.sites))
    assert found.details["lost_adaptation"] == wanted.details["lost_adaptation"]
    assert found.totals["base_parameters"] == wanted.totals["base_parameters"]
    assert found.verify["status"] == "passed"


def test_files_that_nothing_changes_are_copied_byte_for_byte(tmp_path):
    prepared(tmp_path, "llama", ["layers.0.self_attn.q_proj"], torch.bfloat16)
    fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    changed = []
    for path in (tmp_path / "base").iterdir():
        if path.read_bytes() != (tmp_path / "out" / path.name).read_bytes():
            changed.append(path.name)
    index = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())
    assert changed == [index["weight_map"]["model.layers.0.self_attn.q_proj.weight"]]
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "base"))


def test_unmerged_weights_of_other_formats_stay_behind(tmp_path):
    prepared(tmp_path, "llama", ["query"], shards="5GB")
    base = tmp_path / "base"
    (base / "pytorch_model.bin").write_bytes(b"x")
    (base / "consolidated.safetensors").write_bytes(b"x")
    (base / "sub" / "deep").mkdir(parents=True)
    (base / "sub" / "deep" / "config.json").write_text("{}")
    (base / ".cache").mkdir()
    (base / ".cache" / "lock.json").write_text("")
    report = fold_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert report.details["left_out"] == ["consolidated.safetensors", "pytorch_model.bin"]
    assert "sub/deep/config.json" in report.details["copied"]
    tops = {path.split("/")[0] for path in report.details["copied"]}
    assert set(os.listdir(tmp_path / "out")) == tops | {"model.safetensors"}


@pytest.mark.parametrize("other", ["shorter", "longer"])
def test_a_prefix_more_or_less_is_found_and_kept(tmp_path, other):
    prepared(tmp_path, "llama", ["attention"], shards="5GB")
    path = tmp_path / "base" / "model.safetensors"
    change = (lambda name: name.removeprefix("model.")) if other == "shorter" else (lambda name: "module." + name)
    stored = {change(name): value for name, value in load_file(path).items()}
    wanted = fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "plain")
    assert wanted.details["prefix"] == {"left_out": "", "added": ""}
    save_file(stored, path)
    report = fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    kept = {"shorter": {"left_out": "model.", "added": ""}, "longer": {"left_out": "", "added": "module."}}
    assert report.details["prefix"] == kept[other]
    plain = {change(name): value for name, value in tensors_of(tmp_path / "plain").items()}
    same_bits(tensors_of(tmp_path / "out"), plain)


def test_names_that_fit_in_two_ways_or_in_none_are_refused(tmp_path):
    prepared(tmp_path, "llama", ["query"], shards="5GB")
    path = tmp_path / "base" / "model.safetensors"
    stored = load_file(path)
    save_file({f"{side}.{name}": value.clone() for name, value in stored.items() for side in ("a", "b")}, path)
    with pytest.raises(FormatError, match=r"several tensors that could be .*: a\.model.*, b\.model.*--as CLASS"):
        fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    save_file({name.replace("self_attn", "attn"): value for name, value in stored.items()}, path)
    with pytest.raises(FormatError, match=r"has no tensor 'model\.layers\.0\.self_attn\.q_proj\.weight'"):
        fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


TIES = {
    "the head": ["lm_head"],
    "the embedding": ["embed_tokens"],
    "both": ["lm_head", "embed_tokens"],
}


@pytest.mark.parametrize("shards", ["4KB", "5GB"])
@pytest.mark.parametrize("case", TIES)
def test_tied_weights_part_where_one_is_adapted(tmp_path, case, shards):
    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    kind = transformers.LlamaForCausalLM
    model = kind(config).eval()
    model.save_pretrained(tmp_path / "base", max_shard_size=shards)
    assert "lm_head.weight" not in tensors_of(tmp_path / "base")
    lora2fx.transform(model, [*TIES[case], "query"], LoRA(r=2), untie=True, verify=False)
    lora2fx.save(randomise(model), tmp_path / "adapter")
    report = fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert report.details["untied"] == ["lm_head.weight"]
    wanted = in_memory(tmp_path, kind)
    assert wanted.lm_head.weight is not wanted.model.embed_tokens.weight
    loaded = kind.from_pretrained(tmp_path / "out")
    assert not loaded.config.tie_word_embeddings
    same_bits(dict(loaded.state_dict()), dict(wanted.state_dict()))
    if shards == "4KB":
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        stored = tensors_of(tmp_path / "out")
        assert index["weight_map"].keys() == stored.keys()
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in stored.values())
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}


def stop_after(monkeypatch, parts):
    """Have the disk fail after so many tensors."""
    count, write = [0], writing._write

    def failing(part, file):
        count[0] += 1
        if count[0] > parts:
            raise OSError(28, "No space left on device")
        write(part, file)

    monkeypatch.setattr(writing, "_write", failing)
    return count


@pytest.mark.parametrize("kept_every", [1, 2**30])
def test_a_run_that_was_cut_off_is_gone_on_with(tmp_path, monkeypatch, kept_every):
    prepared(tmp_path, "llama", ["attention", "ffn"], torch.bfloat16)
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    wanted = fold_checkpoint(base, adapter, tmp_path / "wanted")
    monkeypatch.setattr(writing, "KEPT_EVERY", kept_every)
    written = 0
    for parts in (0, 4, 5, 3):
        with monkeypatch.context() as context:
            count = stop_after(context, parts)
            with pytest.raises(OSError, match="No space left"):
                fold_checkpoint(base, adapter, out)
            written += count[0] - 1
        assert not out.exists()
    with monkeypatch.context() as context:
        count = stop_after(context, 10**6)
        report = fold_checkpoint(base, adapter, out)
    if kept_every == 1:
        assert count[0] + written == len(tensors_of(base))
    assert report.details["resumed"]
    same_bits(tensors_of(out), tensors_of(tmp_path / "wanted"))
    assert list(map(dict, report.sites)) == list(map(dict, wanted.sites))
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "out", "wanted"]
    assert sorted(os.listdir(out)) == sorted(os.listdir(tmp_path / "wanted"))


def test_another_task_starts_anew(tmp_path, monkeypatch):
    prepared(tmp_path, "llama", ["attention"], torch.bfloat16)
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    with monkeypatch.context() as context:
        stop_after(context, 6)
        with pytest.raises(OSError, match="No space left"):
            fold_checkpoint(base, adapter, out, rounding="stochastic")
    report = fold_checkpoint(base, adapter, out)
    assert not report.details["resumed"]
    fold_checkpoint(base, adapter, tmp_path / "wanted")
    same_bits(tensors_of(out), tensors_of(tmp_path / "wanted"))


KILLED = """
import sys, time
from lora2fx.exporters import streaming
from lora2fx.streaming import fold_checkpoint
streaming.KEPT_EVERY = 1
write = streaming._write
def slow(part, file):
    time.sleep(0.02)
    write(part, file)
streaming._write = slow
print("started", flush=True)
fold_checkpoint(sys.argv[1], sys.argv[2], sys.argv[3])
"""


@pytest.mark.skipif(os.name == "nt", reason="kill -9 is POSIX's")
def test_killed_runs_leave_nothing_half_and_the_last_one_finishes(tmp_path):
    prepared(tmp_path, "llama", ["attention"])
    folders = [str(tmp_path / name) for name in ("base", "adapter", "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for delay in (0.03, 0.15):
        run = subprocess.Popen([sys.executable, "-c", KILLED, *folders], stdout=subprocess.PIPE, env=environment)
        assert run.stdout is not None
        run.stdout.readline()
        time.sleep(delay)
        run.send_signal(signal.SIGKILL)
        run.wait()
        run.stdout.close()
        assert not (tmp_path / "out").exists()
    fold_checkpoint(*folders)
    fold_checkpoint(*folders[:2], tmp_path / "wanted")
    same_bits(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "wanted"))


def test_two_processes_do_not_write_one_folder(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    prepared(tmp_path, "llama", ["query"])
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    with (partial / ".lora2fx-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ExportError, match=r"\.out\.partial is being written by another process"):
            fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    (partial / ".lora2fx-lock").unlink()
    (partial / "mine.txt").write_text("")
    with pytest.raises(ExportError, match=r"\.out\.partial is needed for the work on out and is no leftover of it"):
        fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert (partial / "mine.txt").exists()


def test_another_base_is_refused_unless_it_is_allowed_and_nothing_is_left(tmp_path):
    kind = prepared(tmp_path, "llama", ["query"], shards="5GB")
    path = tmp_path / "base" / "model.safetensors"
    stored = load_file(path)
    stored["model.layers.0.self_attn.q_proj.weight"][0, 0] += 1
    save_file(stored, path, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"layers\.0\.self_attn\.q_proj\.weight is not the base weight .*--allow"):
        fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "new" / "out")
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]
    report = fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", allow_other_base=True)
    assert report.verify["status"] == "UNVERIFIED"
    model = lora2fx.load(kind.from_pretrained(tmp_path / "base"), tmp_path / "adapter", allow_other_base=True)
    lora2fx.fold(model)
    same_bits(dict(kind.from_pretrained(tmp_path / "out").state_dict()), dict(model.state_dict()))


def test_an_unfinished_schedule_is_refused_unless_asked_for(tmp_path):
    prepared(tmp_path, "llama", ["query"], method=LoRA2(r=4, k=3, target_r=2))
    arguments = (tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(ScheduleError, match="never driven"):
        fold_checkpoint(*arguments)
    with pytest.warns(Lora2fxWarning, match="unfinished schedule") as caught:
        fold_checkpoint(*arguments, strict=False)
    assert [one.filename for one in caught] == [__file__], "a warning names the line that called"


def rewritten(path, change):
    """The safetensors file with another header."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


QUERY = "model.layers.0.self_attn.q_proj.weight"


def spoil_config(base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))


def edit(change):
    return lambda base: rewritten(base / "model.safetensors", change)


SPOILED = {
    "no weights": (lambda base: (base / "model.safetensors").unlink(), r"no \.safetensors file and 0 ind|holds no"),
    "cut short": (
        lambda base: os.truncate(base / "model.safetensors", (base / "model.safetensors").stat().st_size - 4),
        "do not fill the file",
    ),
    "no header": (lambda base: (base / "model.safetensors").write_bytes(b"\xff" * 64), "is no safetensors file"),
    "no JSON": (
        lambda base: (base / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b"nope"),
        "no valid JSON",
    ),
    "quantised": (spoil_config, "is quantised"),
    "an overlap": (edit(lambda h: h[QUERY]["data_offsets"].__setitem__(0, 0)), "takes .* bytes|do not fill"),
    "a wrong shape": (edit(lambda h: h[QUERY].update(shape=[1, 2])), "takes .* bytes, which F32"),
    "another shape": (
        edit(lambda h: h[QUERY].update(shape=[h[QUERY]["shape"][0] // 2, h[QUERY]["shape"][1] * 2])),
        "the adapter is for a floating-point weight",
    ),
    "no floats": (edit(lambda h: h[QUERY].update(dtype="I32")), "as I32 .*; the adapter is for a floating-point"),
    "an odd dtype": (edit(lambda h: h[QUERY].update(dtype="F4")), "as F4"),
    "no place": (edit(lambda h: h[QUERY].pop("data_offsets")), "no dtype, shape and place"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_base_that_is_spoiled_is_refused_and_nothing_is_written(tmp_path, case):
    prepared(tmp_path, "llama", ["query"], shards="5GB")
    spoil, message = SPOILED[case]
    spoil(tmp_path / "base")
    with pytest.raises(FormatError, match=message):
        fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


def spoil_index(change):
    def spoil(base):
        path = base / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))

    return spoil


INDICES = {
    "outside": (spoil_index(lambda i: i["weight_map"].update({QUERY: "../x.safetensors"})), "no file of its own fold"),
    "another file": (
        spoil_index(lambda i: i["weight_map"].update({QUERY: sorted(set(i["weight_map"].values()))[-1]})),
        "disagree, first about",
    ),
    "no map": (spoil_index(lambda i: i.pop("weight_map")), "has no weight_map"),
    "a missing file": (lambda base: min(base.glob("*.safetensors")).unlink(), "can't be read: No such file"),
}


@pytest.mark.parametrize("case", INDICES)
def test_an_index_that_is_wrong_is_refused(tmp_path, case):
    prepared(tmp_path, "llama", ["query"])
    spoil, message = INDICES[case]
    spoil(tmp_path / "base")
    with pytest.raises(FormatError, match=message):
        fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_what_cannot_be_asked_for(tmp_path, monkeypatch):
    prepared(tmp_path, "llama", ["query"])
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    with pytest.raises(ExportError, match="base is there already"):
        fold_checkpoint(base, adapter, base)
    with pytest.raises(MethodError, match="rounding='up'"):
        fold_checkpoint(base, adapter, tmp_path / "out", rounding="up")
    with pytest.raises(FormatError, match=r"none is no folder"):
        fold_checkpoint(tmp_path / "none", adapter, tmp_path / "out")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(ExportError, match=r"out needs 0\.0 GB and .* has 0\.0 GB left"):
        fold_checkpoint(base, adapter, tmp_path / "out")


def test_an_update_that_overflows_is_refused_and_nothing_is_left(tmp_path):
    model = ZOO["llama"].build().half()
    model.save_pretrained(tmp_path / "base")
    lora2fx.transform(model, ["query"], LoRA(r=2), verify=False)
    lora2fx.save(randomise(model, 1e4), tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"leaves torch\.float16"):
        fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


def test_a_head_that_the_base_lacks_is_refused(tmp_path):
    model = ZOO["bert"].build()
    model.bert.save_pretrained(tmp_path / "base")
    lora2fx.transform(model, ["query"], LoRA(r=2), verify=False)
    lora2fx.save(randomise(model), tmp_path / "adapter")
    with pytest.raises(FormatError, match=r"base has no tensor .*--as CLASS"):
        fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_modes_follow_the_umask(tmp_path):
    prepared(tmp_path, "llama", ["query"])
    before = os.umask(0o027)
    try:
        fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


def test_no_more_than_one_tensor_is_held(tmp_path, monkeypatch):
    wide = nn.Sequential(*[nn.Linear(64, 128, bias=False) for _ in range(8)]).bfloat16()
    (tmp_path / "base").mkdir()
    stored = {f"{i}.weight": layer.weight.detach() for i, layer in enumerate(wide)}
    save_file(stored, tmp_path / "base" / "any.safetensors")
    lora2fx.transform(wide, ["re:.*"], LoRA(r=2), verify=False)
    lora2fx.save(randomise(wide, 0.01), tmp_path / "adapter")
    alive, read = [], Stored.read

    def watched(self):
        assert [tensor for tensor in (reference() for reference in alive) if tensor is not None] == []
        tensor = read(self)
        alive.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    monkeypatch.setattr(Stored, "read", watched)
    fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert len(alive) == 8
    assert sorted(os.listdir(tmp_path / "out")) == ["any.safetensors"]

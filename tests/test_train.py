"""`lora2fx train` from the outside: every task and method on tiny models, and what is left of a run."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import lora2fx
from lora2fx.cli import main
from tests import finetuned
from tests.loops import forget


@pytest.fixture(autouse=True)
def _aside(tmp_path, monkeypatch):
    """Caches of `datasets` in the test's own folder, and no state of accelerate from before."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    forget()
    yield
    forget()


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetuned.bert_folder(tmp_path_factory.mktemp("models") / "bert", dropout=0.0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetuned.llama_folder(tmp_path_factory.mktemp("models") / "llama")


def train(model: Path, data: Path, out: Path, *options: str) -> int:
    usual = ("--cpu", "--batch", "8", "--length", "16")
    return main(["train", "--model", str(model), "--data", str(data), "--out", str(out), *usual, *options])


def record(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def delivered(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a csv file with all three exports."""
    folder = tmp_path_factory.mktemp("runs")
    data, out = finetuned.write_csv(folder / "rated.csv", finetuned.rated(120)), folder / "new" / "one"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "cache"))
        options = ["--label", "label", "--steps", "30", "--lr", "0.02", "--export", "onnx,peft,safetensors"]
        assert train(bert, data, out, *options) == 0
    return out


def test_a_run_leaves_adapter_exports_and_reports(delivered):
    """The two classes are told apart by words; a run of this length gets all of them right."""
    names = {path.name for path in delivered.iterdir()}
    exports = {"merged", "model.onnx", "model.onnx.report.json", "peft"}
    assert names == {"adapter", "report.html", "report.json", "run.json"} | exports
    found = record(delivered)
    assert found["status"] == "finished" and found["step"] == found["steps"] == 30
    assert found["data"]["classes"] == ["bad", "good"] and found["data"]["validation_rows"] == 12
    assert found["history"]["validation"][-1]["accuracy"] == 1.0
    assert found["totals"]["kept"]["columns"] == found["totals"]["budgets"]["columns"] == 12
    assert {kind: own["verify"]["status"] for kind, own in found["exports"].items()} == dict.fromkeys(
        ("onnx", "peft", "safetensors"), "passed"
    )
    assert found["sizes"].keys() == {"adapter", "onnx", "peft", "safetensors"}
    page = (delivered / "report.html").read_text()
    assert "Rank of ΔW, layer by weight" in page and "model.onnx" in page


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own call
def test_the_three_exports_and_the_adapter_are_one_model(bert, delivered):
    """Oracle: the merged folder through transformers, against ONNX Runtime, PEFT and the adapter on a fresh base."""
    onnxruntime = pytest.importorskip("onnxruntime")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    merged = AutoModelForSequenceClassification.from_pretrained(delivered / "merged").eval()
    assert merged.config.id2label == {0: "bad", 1: "good"}
    tokenizer = AutoTokenizer.from_pretrained(delivered / "merged")
    inputs = tokenizer(["warm and gentle cats", "ugly and cold and dull dogs"], padding=True)
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    with torch.no_grad():
        expected = merged(**tensors).logits
        base, plain = (AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2).eval() for _ in range(2))
        adapted = lora2fx.load(base, delivered / "adapter")(**tensors).logits
        through_peft = peft.PeftModel.from_pretrained(plain, delivered / "peft").eval()(**tensors).logits
    assert expected.argmax(-1).tolist() == [1, 0]
    session = onnxruntime.InferenceSession(str(delivered / "model.onnx"), providers=["CPUExecutionProvider"])
    known = {value.name for value in session.get_inputs()}
    (logits,) = session.run(None, {name: value.numpy() for name, value in tensors.items() if name in known})
    for found in (adapted, through_peft, torch.from_numpy(logits)):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_regression_reports_correlations(bert, tmp_path):
    from scipy.stats import pearsonr

    data = finetuned.write_csv(tmp_path / "rated.tsv", finetuned.rated(80), "\t")
    out = tmp_path / "one"
    options = ["--task", "regression", "--label", "score", "--steps", "40", "--lr", "0.02", "--export", "safetensors"]
    assert train(bert, data, out, *options) == 0
    found = record(out)
    last = found["history"]["validation"][-1]
    assert last["pearson"] > 0.9 and last["mse"] < 0.2
    from lora2fx.finetuning.sequences import Regression

    wanted, given = np.array([0.0, 1.0, 2.0, 4.0]), np.array([[0.5], [1.0], [1.5], [2.0]])
    measured = Regression().measure(given, wanted)
    assert measured["pearson"] == pytest.approx(pearsonr(given[:, 0], wanted).statistic)
    assert measured["mse"] == pytest.approx((0.25 + 0 + 0.25 + 4) / 4)
    assert Regression().measure(np.zeros((3, 1)), wanted[:3])["pearson"] == 0.0


def test_token_classification_labels_words(bert, tmp_path):
    data = finetuned.write_jsonl(tmp_path / "tagged.jsonl", finetuned.tagged(80))
    dev = finetuned.write_jsonl(tmp_path / "dev.jsonl", finetuned.tagged(20, seed=1))
    out = tmp_path / "one"
    options = ["--task", "token-classification", "--validation", str(dev), "--steps", "40", "--lr", "0.02"]
    assert train(bert, data, out, *options) == 0
    found = record(out)
    assert found["data"]["classes"] == ["O", "QUALITY", "SUBJECT"]
    scores = [entry["f1"] for entry in found["history"]["validation"]]
    assert scores[-1] > 0.75 and scores[-1] > scores[0]
    assert found["model"]["class"] == "BertForTokenClassification"


@pytest.mark.parametrize("options", [[], ["--pack"]])
def test_a_language_model_learns_its_few_sentences(llama, tmp_path, options):
    data = finetuned.write_jsonl(tmp_path / "rated.jsonl", finetuned.rated(80))
    out = tmp_path / "one"
    assert train(llama, data, out, "--task", "causal-lm", "--steps", "20", "--lr", "0.05", *options) == 0
    validation = record(out)["history"]["validation"]
    assert validation[-1]["perplexity"] == pytest.approx(math.exp(validation[-1]["loss"]))
    assert validation[-1]["perplexity"] < 0.9 * validation[0]["perplexity"]


@pytest.mark.parametrize("method", ["lora", "adalora", "sora", "salora", "alora", "full", "bitfit", "houlsby"])
def test_every_method_and_baseline(bert, tmp_path, method):
    data = finetuned.write_jsonl(tmp_path / "rated.jsonl", finetuned.rated(60))
    out = tmp_path / "one"
    few = ["--set", "cycles=1", "r=2"] if method == "alora" else []  # it scores every rank by a forward
    assert train(bert, data, out, "--method", method, "--steps", "10", *few) == 0
    found = record(out)
    assert found["status"] == "finished"
    assert found["model"]["method"].lower().startswith({"full": "fullfinetuning"}.get(method, method))
    kept = "trained.safetensors" if method in ("full", "bitfit", "houlsby") else "adapter"
    assert (out / kept).exists() and "accuracy" in found["history"]["validation"][-1]
    assert not (out / "checkpoints").exists()


def test_hyperparameters_and_targets_are_passed_on(bert, tmp_path):
    data = finetuned.write_jsonl(tmp_path / "rated.jsonl", finetuned.rated(60))
    out = tmp_path / "one"
    words = [
        "--set",
        "target_k=null",
        "k=2",
        "--set",
        "init=zero_out",
        "--targets",
        "value",
        "--exclude",
        "re:.*layer.0.*",
    ]
    assert train(bert, data, out, "--steps", "5", *words) == 0
    found = record(out)
    adapted = [site for site in found["sites"] if site["rank"] is not None]
    assert [site["weight"] for site in adapted] == ["bert.encoder.layer.1.attention.self.value.weight"]
    assert "k=2" in found["model"]["method"] and "init='zero_out'" in found["model"]["method"]
    assert found["totals"]["budgets"] == {}


def test_full_fine_tuning_is_exported_merged(bert, tmp_path):
    from transformers import AutoModelForSequenceClassification

    data = finetuned.write_jsonl(tmp_path / "rated.jsonl", finetuned.rated(60))
    out = tmp_path / "one"
    assert train(bert, data, out, "--method", "full", "--steps", "5", "--export", "safetensors") == 0
    from safetensors.torch import load_file

    trained = load_file(out / "trained.safetensors")
    merged = AutoModelForSequenceClassification.from_pretrained(out / "merged").state_dict()
    assert all(torch.equal(merged[name], value) for name, value in trained.items() if name in merged)
    assert len(trained) >= len(dict(merged))


def test_a_folder_of_files_and_pairs_of_texts(bert, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{**row, "text2": row["text"][::-1]} for row in finetuned.rated(40)]
    finetuned.write_jsonl(folder / "train.jsonl", rows)
    finetuned.write_csv(folder / "dev.csv", rows[:10])
    out = tmp_path / "one"
    assert train(bert, folder, out, "--steps", "3", "--rows", "20") == 0
    data = record(out)["data"]
    assert (data["train_rows"], data["validation_rows"], data["text"]) == (20, 10, ["text", "text2"])
    shown = capsys.readouterr().out
    assert "20 rows to train on, 10 to validate (split dev of" in shown
    assert "text text and text2, label label (2 classes: bad, good)" in shown
    assert "new and trained whole: classifier" in shown
    assert "step 3: validation loss" in shown and "Rank of ΔW" in shown and f"Written to {out}: adapter/" in shown


def test_the_log_has_budget_active_importance_penalty_and_skipped_steps(bert, tmp_path):
    data = finetuned.write_jsonl(tmp_path / "rated.jsonl", finetuned.rated(60))
    out = tmp_path / "one"
    assert train(bert, data, out, "--steps", "20") == 0
    found = record(out)
    training = found["history"]["training"]
    assert [entry["step"] for entry in training] == list(range(1, 21))
    budget = [entry["lora2fx/columns_budget"] for entry in training]
    assert budget[0] == 36 and budget[-1] == 12 and budget == sorted(budget, reverse=True)
    assert [entry["lora2fx/columns_active"] for entry in training] == budget
    assert all(entry["lora2fx/penalty"] >= 0 and entry["lora2fx/skipped_steps"] == 0 for entry in training)
    assert training[5]["lora2fx/columns_importance_q90"] >= training[5]["lora2fx/columns_importance_q10"] >= 0
    importances = [site["importances"] for site in found["sites"] if site["rank"] is not None]
    assert all(len(own["columns"]) == 3 for own in importances)


def test_two_processes_train_one_model_and_one_of_them_speaks(bert, tmp_path):
    """As torchrun starts them, on gloo; masks that differed between them would have raised."""
    data = finetuned.write_jsonl(tmp_path / "rated.jsonl", finetuned.rated(60))
    out = tmp_path / "out"
    words = ["--model", str(bert), "--data", str(data), "--out", str(out), "--cpu", "--batch", "8", "--steps", "8"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [*command, "-m", "lora2fx", "train", *words], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Written to") == 1 and done.stdout.count("step 8: validation loss") == 1
    found = record(out)
    assert (found["status"], found["step"], found["totals"]["kept"]["columns"]) == ("finished", 8, 12)
    assert found["history"]["validation"][-1]["epoch"] == 2, "54 rows, 16 a step"
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "report.html", "report.json", "run.json"]

"""The text benchmark on a tiny random encoder and a made-up folder: the whole command, resuming, what is refused."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import matthews_corrcoef

from benchmarks.quality.text import __main__ as command
from benchmarks.quality.text import ablation, comparison
from benchmarks.quality.text.comparison import climb
from benchmarks.quality.text.contestants import ENTRIES, GOALS, GROUPS, LADDER
from benchmarks.quality.text.encoder import PooledClassifier, make_model, targets_of
from benchmarks.quality.text.examples import BATCH, Source, examples_of, find_source
from benchmarks.quality.text.table import over_tasks, show_all, show_goals, show_ranks, split_layer
from benchmarks.quality.text.task import HELD_SHARE, Plan, run_text
from lora2fx.errors import DataError
from tests.finetuned import BAD, GOOD, SUBJECTS, bert_folder

SIZES = {"train": 96, "dev": 20}


def write_tasks(folder: Path) -> Path:
    """GLUE-format tasks: a text and a class, a pair and a class, a text and a number."""
    choose = random.Random(0)

    def text() -> tuple[str, int]:
        good = choose.random() < 0.6
        words = ["very"] * choose.randrange(4)
        return " ".join(["the", choose.choice(SUBJECTS), "are", *words, choose.choice(GOOD if good else BAD)]), int(
            good
        )

    for name in ("cola", "pairs", "numbers"):
        (folder / name).mkdir(parents=True)
        for split, count in SIZES.items():
            lines = []
            for _ in range(count):
                (one, label), (other, second) = text(), text()
                row = {"text": one, "label": label}
                if name == "pairs":
                    row |= {"text2": other, "label": int(label == second)}
                if name == "numbers":
                    row["label"] = label + 0.5 * choose.random()
                lines.append(json.dumps(row) + "\n")
            (folder / name / f"{split}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(bert_folder(tmp_path_factory.mktemp("encoder")))


@pytest.fixture
def plan(data: Path, model: str) -> Plan:
    return Plan(model, tuple(find_source(name, data) for name in ("cola", "pairs", "numbers")), steps=12)


def test_the_whole_command_and_what_was_cut_off_goes_on(
    data: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "TUNING_SEEDS", (100,))
    out = tmp_path / "runs.jsonl"
    asked = ["--data", str(data), "--model", model, "--out", str(out), "--steps", "10", "--task", "cola", "pairs"]
    asked += ["--tune", "cola", "--only", "head only", "LoRA r=1", "LoRA² 3→1"]
    command.main([*asked, "--seeds", "1"])
    first = out.read_text()
    command.main([*asked, "--seeds", "2"])
    assert out.read_text().startswith(first)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    tests = [(r["contestant"], r["task"], r["seed"]) for r in records if r["use"] == "test"]
    assert len(tests) == len(set(tests)) == 3 * 2 * 2
    assert {r["metric"] for r in records if r["task"] == "cola"} == {"matthews"}
    rates = {r["contestant"]: {s["rate"] for s in records if s["contestant"] == r["contestant"]} for r in records}
    assert rates["head only"] == {0.0} and all(len(tried) >= 3 for name, tried in rates.items() if "LoRA" in name)
    words = {word for line in (data / "cola" / "train.jsonl").read_text().splitlines() for word in line.split()}
    assert not words & {"cats", "dull"} & set(out.read_text().split())

    capsys.readouterr()
    monkeypatch.setattr(comparison, "run_text", None)
    command.main([*asked, "--seeds", "2", "--show"])
    printed = capsys.readouterr().out
    assert "Mean over cola, pairs" in printed and "LoRA² 3→1  LoRA r=1" in printed
    assert out.with_suffix(".txt").read_text() == printed


def test_mistakes_are_told_before_anything_runs(data: Path, model: str, tmp_path: Path) -> None:
    asked = ["--data", str(data), "--model", model, "--out", str(tmp_path / "runs.jsonl")]
    with pytest.raises(SystemExit, match=r"--task rte: .* holds no folder of that name \(there is: cola, numbers"):
        command.main([*asked, "--task", "rte"])
    with pytest.raises(SystemExit, match=r"--task cola: .*no such folder"):
        command.main([*asked, "--data", str(tmp_path / "nowhere"), "--task", "cola"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="holds no train file"):
        command.main([*asked, "--task", str(tmp_path / "empty")])
    with pytest.raises(SystemExit, match="--tune mnli: it is none of the tasks"):
        command.main([*asked, "--task", "cola", "--tune", "mnli"])
    with pytest.raises(SystemExit, match="two of the tasks have the same name"):
        command.main([*asked, "--task", "cola", str(data / "cola")])
    with pytest.raises(SystemExit, match=r"runs\.jsonl holds no finished test run"):
        command.main([*asked, "--task", "cola", "--show"])
    assert not (tmp_path / "runs.jsonl").exists()


def test_runs_of_another_plan_are_not_mixed(data: Path, model: str, tmp_path: Path) -> None:
    out = tmp_path / "runs.jsonl"
    line = {"task": "cola", "contestant": "LoRA r=1", "rate": 0.1, "seed": 0, "use": "test", "steps": 12, "score": 0.5}
    line["precision"] = "float32"
    asked = ["--data", str(data), "--model", model, "--out", str(out), "--task", "cola", "--show"]
    out.write_text(json.dumps(line) + "\n")
    with pytest.raises(SystemExit, match="12 steps on cola, and 13 were asked for"):
        command.main([*asked, "--steps", "13"])
    out.write_text(json.dumps(line) + "\n" + json.dumps({**line, "rate": 0.2, "seed": 1}) + "\n")
    with pytest.raises(SystemExit, match=r"at the rates 0.1 and 0.2"):
        command.main([*asked, "--steps", "12"])
    for main in (command.main, ablation.main):
        with pytest.raises(SystemExit, match="holds runs in float32, and bfloat16 was asked for"):
            main(
                [argument for argument in asked if argument != "--show"] + ["--steps", "12", "--precision", "bfloat16"]
            )
    assert len(out.read_text().splitlines()) == 2


def test_runs_at_a_rate_since_given_up_are_left_out(plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "runs.jsonl"
    tuned = [(0.1, "cola", 0.2), (0.1, "pairs", 0.4), (0.2, "cola", 0.5), (0.2, "pairs", 0.3), (0.3, "cola", 0.9)]
    shared = {"contestant": "LoRA r=1", "steps": 12, "precision": "float32"}
    lines = [
        {**shared, "task": task, "rate": rate, "seed": seed, "use": "tune", "score": score}
        for seed in comparison.TUNING_SEEDS
        for rate, task, score in tuned
    ]
    lines += [
        {**shared, "task": "cola", "rate": rate, "seed": 0, "use": "test", "score": rate} for rate, *_ in tuned[1:]
    ]
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = comparison.Comparison(plan, ("cola", "pairs"), out).finished()
    assert [record["rate"] for record in found] == [0.2]


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("name", ENTRIES)
def test_every_contestant_runs_and_is_counted(name: str, plan: Plan) -> None:
    found = run_text(plan, "pairs", ENTRIES[name].contestant, 0.01, 0, "tune")
    assert 0 <= found["score"] <= 1 and found["before"] >= found["after"] >= 0
    model = make_model(plan.model, 2, 0)
    sizes = {f"{path}.weight": sum(model.get_submodule(path).weight.shape) for path in targets_of(plan.model)}
    assert set(found["ranks"]) <= set(sizes)
    assert found["folded"] == sum(rank * sizes[weight] for weight, rank in found["ranks"].items())
    if "→" in name:
        assert sum(found["ranks"].values()) <= len(sizes) * int(name.rpartition("→")[2].partition(",")[0])


def test_a_run_is_the_same_again(plan: Plan) -> None:
    runs = [run_text(plan, "numbers", ENTRIES["LoRA² 3→1"].contestant, 0.01, 3, "test") for _ in range(2)]
    for run in runs:
        del run["seconds"]
    assert runs[0] == runs[1] and runs[0]["metric"] == "pearson"


def test_the_forward_computes_in_the_precision_that_was_asked_for(plan: Plan) -> None:
    runs = {
        precision: run_text(
            replace(plan, precision=precision), "pairs", ENTRIES["LoRA r=1"].contestant, 0.01, 0, "tune"
        )
        for precision in ("float32", "bfloat16")
    }
    assert all(run["precision"] == precision for precision, run in runs.items())
    assert 0 < abs(runs["float32"]["loss"] - runs["bfloat16"]["loss"]) < 0.1


def test_contestants_share_the_six_targets_and_the_head(model: str) -> None:
    paths = targets_of(model)
    kinds = {path.split(".", 4)[4] for path in paths}
    assert len(paths) == 12 and kinds == {
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    }
    one, again, other = (make_model(model, 3, seed) for seed in (0, 0, 1))
    assert torch.equal(one.classifier.weight, again.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    assert not any(parameter.requires_grad for parameter in one.parameters())


def test_padding_changes_no_prediction(data: Path, model: str) -> None:
    examples = examples_of(find_source("pairs", data), model)
    classifier = make_model(model, 2, 0).eval()
    rows = sorted(range(len(examples.train)), key=lambda position: len(examples.train.rows[position]["input_ids"]))
    both, short = examples.train.batch([rows[-1], rows[0]]), examples.train.batch([rows[0]])
    assert both["input_ids"].shape[1] > short["input_ids"].shape[1]
    with torch.no_grad():
        torch.testing.assert_close(classifier(**both).logits[1:], classifier(**short).logits, rtol=1e-4, atol=1e-5)


def test_the_mean_is_over_tokens_that_are_there() -> None:
    class Encoder(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            from types import SimpleNamespace

            return SimpleNamespace(last_hidden_state=input_ids.unsqueeze(-1).float())

    classifier = PooledClassifier(Encoder(), 1, 1)
    torch.nn.init.ones_(classifier.classifier.weight)
    torch.nn.init.zeros_(classifier.classifier.bias)
    found = classifier(torch.tensor([[2, 4, 9]]), torch.tensor([[1, 1, 0]]), labels=torch.tensor([1.0]))
    assert found.logits.item() == 3 and found.loss.item() == 4


def test_batches_cover_every_row_once_an_epoch_and_tuning_sees_no_dev_row(data: Path, model: str) -> None:
    examples = examples_of(find_source("cola", data), model)
    batches = list(examples.train.shuffled(3, 0))
    assert [len(batch["labels"]) for batch in batches] == [BATCH] * 3 == [96 // 3] * 3
    seen = sorted(batch["labels"].sum().item() for batch in batches)
    assert sum(seen) == examples.train.labels.sum().item()
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, examples.train.shuffled(3, 0), strict=True)
    )
    kept, held = examples.train.split(HELD_SHARE, 5)
    assert (len(kept), len(held)) == (72, 24)
    assert {id(row["input_ids"]) for row in kept.rows + held.rows} == {
        id(row["input_ids"]) for row in examples.train.rows
    }


def test_scores_are_scikit_learn_s(data: Path, model: str) -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, 1.0], [0.0, 1.0], [2.0, 3.0]])
    labels = torch.tensor([1, 0, 0, 1])
    found = examples_of(find_source("cola", data), model).score(logits, labels)
    assert found == pytest.approx(matthews_corrcoef(labels, logits.argmax(1)))
    found = examples_of(find_source("numbers", data), model).score(logits[:, :1], labels.float())
    assert found == pytest.approx(stats.pearsonr(logits[:, 0], labels.float()).statistic)


def test_sources_are_folders_paths_or_datasets(data: Path) -> None:
    assert find_source("cola", data) == Source("cola", str(data / "cola"))
    assert find_source(str(data / "cola"), None) == Source("cola", str(data / "cola"))
    assert find_source("nyu-mll/glue:rte", data) == Source("rte", "nyu-mll/glue", "rte")
    assert find_source("dbpedia/trec", None) == Source("trec", "dbpedia/trec")
    with pytest.raises(DataError, match=r"--task trec: there is no such folder\. Pass --data"):
        find_source("trec", None)
    with pytest.raises(DataError, match="holds no folder"):
        find_source("rte", data)


@pytest.mark.parametrize("best", LADDER)
def test_the_search_ends_at_the_best_rate(best: float) -> None:
    tried = []

    def score(rate: float) -> float:
        tried.append(rate)
        return -abs(np.log(rate / best))

    assert climb(score, LADDER, 5e-3) == best
    assert len(tried) == len(set(tried))


def result(name: str, seed: int, score: float, task: str = "cola", ranks: tuple[int, int] = (1, 1)) -> dict:
    sizes = {"before": 30, "after": 20, "folded": 10, "seconds": 0.002, "metric": "accuracy", "steps": 5, "rate": 0.1}
    weights = [f"e.layer.{layer}.attention.self.query.weight" for layer in (0, 1)]
    ranks = dict(zip(weights, ranks, strict=True))
    return {"task": task, "contestant": name, "seed": seed, "score": score, "use": "test", "ranks": ranks, **sizes}


def test_the_mean_is_over_seeds_that_have_all_tasks() -> None:
    records = [result("LoRA r=1", 0, 0.2), result("LoRA r=1", 0, 0.6, "trec"), result("LoRA r=1", 1, 0.9)]
    assert [(r["seed"], r["score"]) for r in over_tasks(records, ["cola", "trec"])] == [(0, pytest.approx(0.4))]
    assert "Mean over" not in show_all(records[2:], ["cola", "trec"])


def test_a_task_that_only_some_were_run_on_has_a_mean_of_its_own() -> None:
    first, second = "LoRA r=1", "LoRA² 3→1"
    records = [result(first, 0, score, task) for task, score in (("cola", 0.2), ("trec", 0.4), ("mrpc", 0.9))]
    records += [result(second, 0, score, task) for task, score in (("cola", 0.3), ("trec", 0.7))]
    text = show_all(records, ["cola", "trec", "mrpc"])
    common, _, every = text.partition("Mean over cola, trec, mrpc\n")
    assert common.startswith("Mean over cola, trec\n")
    assert "30.0 ± 0.0" in common and "50.0 ± 0.0" in common
    means, _, _ = every.partition("\n\ncola")
    assert "50.0 ± 0.0" in means and second not in means


def test_goals_are_paired_by_seed() -> None:
    pairs = {"LoRA² 3→1": (0.8, 0.9, 0.7), "LoRA r=1": (0.7, 0.85, 0.5)}
    records = [result(name, seed, score) for name, own in pairs.items() for seed, score in enumerate(own)]
    lines = show_goals(records).splitlines()
    low, high = stats.ttest_rel(*(np.array(own) * 100 for own in pairs.values())).confidence_interval(0.95)
    assert len(lines) == 3 and "+11.67" in lines[2] and f"± {(high - low) / 2:.2f}" in lines[2]


def test_ranks_are_layer_by_weight_with_tasks_beside_each_other() -> None:
    records = [result("LoRA² 3→1", seed, 0.5, name, (seed, 2)) for seed in (0, 1) for name in ("cola", "trec")]
    lines = show_ranks(records, ["cola", "trec"]).splitlines()
    assert lines[0].split() == ["LoRA²", "3→1", "cola", "trec"] and lines[1].split() == ["0", "1", "0", "1"]
    assert lines[2].split() == ["attention.self.query", "0.5", "2.0", "0.5", "2.0"]
    assert show_ranks([result("LoRA r=1", 0, 0.5)], ["cola"]) == ""
    assert split_layer("head.weight") == ("", "head")


def test_everyone_has_someone_to_be_compared_with() -> None:
    assert sum(map(len, GROUPS)) == len(ENTRIES)
    assert all(entry.against in ENTRIES and entry.rate in (None, *LADDER, *ENTRIES) for entry in ENTRIES.values())
    assert all(name in ENTRIES for pair in GOALS for name in pair)


def test_the_ablation_is_paired_with_the_default(data: Path, model: str, tmp_path: Path) -> None:
    out = tmp_path / "runs.jsonl"
    asked = ["--data", str(data), "--model", model, "--out", str(out), "--steps", "10", "--task", "cola", "--seeds"]
    ablation.main([*asked, "1", "--only", "default", "k = 1, no pruning"])
    first = out.read_text()
    ablation.main([*asked, "2", "--only", "default", "k = 1, no pruning"])
    assert out.read_text().startswith(first) and len(out.read_text().splitlines()) == 4
    assert {json.loads(line)["use"] for line in first.splitlines()} == {"tune"}
    printed = out.with_suffix(".txt").read_text()
    assert printed.count("to default") == 4 and "Mean\n" in printed and "cola\n" in printed
    with pytest.raises(SystemExit, match="holds no folder of that name"):
        ablation.main([*asked, "1", "--task", "rte"])

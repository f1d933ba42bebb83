"""The demo: its data and model against independent computations, its fairness, and the job from end to end."""

from __future__ import annotations

import copy
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import SGD

import lora2fx
from lora2fx.demo.contestants import RECIPES, Recipe, adapt, train_base, with_fresh_head
from lora2fx.demo.digits import Examples, hold_back, load_tasks
from lora2fx.demo.fitting import accuracy, fit
from lora2fx.demo.job import QUICK, run_demo
from lora2fx.demo.measuring import differences, latencies
from lora2fx.demo.tables import demo_tables, format_demo, plain_parameters
from lora2fx.demo.transformer import Attention, VisionTransformer
from lora2fx.demo.tuning import candidates, tune_seed
from lora2fx.errors import Lora2fxError


def rows(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_the_tasks_are_the_digits_split_by_class_and_by_use() -> None:
    source = load_digits()
    low, high = load_tasks()
    assert len(low.train) + len(low.test) == int((source.target < 5).sum())
    assert len(high.train) + len(high.test) == int((source.target >= 5).sum())
    everything = torch.tensor(source.images, dtype=torch.float32) / 16
    nines = rows(everything[source.target == 9])
    assert rows(high.train.images[high.train.labels == 4]) | rows(high.test.images[high.test.labels == 4]) == nines
    assert not rows(high.train.images) & rows(high.test.images)


def test_holding_back_takes_the_share_of_each_class_and_depends_on_the_seed_only() -> None:
    labels = torch.arange(5).repeat_interleave(20)
    examples = Examples(torch.arange(100.0).reshape(100, 1, 1).expand(100, 8, 8), labels)
    first, again, other = (hold_back(examples, 0.25, seed) for seed in (0, 0, 1))
    assert first.test.labels.bincount().tolist() == [5] * 5
    assert sorted([*first.train.images[:, 0, 0].tolist(), *first.test.images[:, 0, 0].tolist()]) == list(range(100))
    assert torch.equal(first.test.images, again.test.images)
    assert not torch.equal(first.test.images, other.test.images)


def test_attention_is_softmax_of_scaled_products() -> None:
    """Oracle: the formula, head by head, in float64."""
    torch.manual_seed(0)
    module, x = Attention(12, 3).double(), torch.randn(2, 5, 12, dtype=torch.float64)
    heads = []
    for head in (slice(0, 4), slice(4, 8), slice(8, 12)):
        query, key, value = (layer(x)[..., head] for layer in (module.query, module.key, module.value))
        heads.append(torch.softmax(query @ key.mT / 2, -1) @ value)
    torch.testing.assert_close(module(x), module.output(torch.cat(heads, -1)), atol=1e-12, rtol=0)


def test_a_patch_is_a_square_of_the_image() -> None:
    """Pixels of one 2 × 2 square move exactly one token."""
    model = VisionTransformer()
    seen: list[Tensor] = []
    model.embedding.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    images = torch.zeros(1, 8, 8)
    images[0, 2:4, 6:8] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    model(images)
    assert seen[0].shape == (1, 16, 4)
    assert seen[0][0, 4 * 1 + 3].tolist() == [1, 2, 3, 4]
    assert seen[0].count_nonzero() == 4


def test_the_models_weights_are_found_by_role() -> None:
    report = lora2fx.inspect(VisionTransformer(layers=1), (torch.rand(2, 8, 8),))
    found = {site["weight"]: site["role"] for site in report.sites if site["weight"].startswith("blocks.0.")}
    roles = {"query": "query", "key": "key", "value": "value", "output": "output"}
    expected = {f"blocks.0.attention.{name}.weight": role for name, role in roles.items()}
    expected |= {f"blocks.0.ffn.{name}.weight": f"ffn.{name}" for name in ("up", "down")}
    assert {weight: found[weight] for weight in expected} == expected


def test_accuracy_counts() -> None:
    class Fixed(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.eye(5)[images[:, 0, 0].long()]

    examples = Examples(torch.tensor([0.0, 1, 2, 3]).reshape(4, 1, 1).expand(4, 8, 8), torch.tensor([0, 1, 2, 0]))
    assert accuracy(Fixed(), examples) == 0.75


def test_fit_is_reproducible_warms_up_and_ends_near_zero(capsys: pytest.CaptureFixture[str]) -> None:
    _, task = load_tasks()
    models = [copy.deepcopy(model) for model in [VisionTransformer(layers=1)] * 2]
    rates: list[float] = []
    for model in models:
        optimizer = SGD(model.parameters(), lr=0.1)
        optimizer.register_step_post_hook(lambda one, args, kwargs: rates.append(one.param_groups[0]["lr"]))
        fit(model, optimizer, task.train, steps=50, seed=3, label="test")
    assert all(torch.equal(one, two) for one, two in zip(*(model.parameters() for model in models), strict=True))
    assert rates[:3] == pytest.approx([0.1 / 3, 0.2 / 3, 0.1])
    assert rates[:50] == rates[50:]
    assert rates[2:50] == sorted(rates[2:50], reverse=True)
    assert 0 < rates[49] < 0.003
    assert capsys.readouterr().err == ""


def test_every_contestant_starts_from_the_same_base_and_head() -> None:
    base = VisionTransformer(layers=1)
    before = copy.deepcopy(base.state_dict())
    _, task = load_tasks()
    images = task.test.images[:7]
    start = with_fresh_head(base, 5)
    for recipe in RECIPES:
        untrained = Recipe(recipe.name, recipe.method, head_rate=0.0, adapter_rate=0.0)
        model = adapt(base, task.train, untrained, steps=10, seed=5)
        torch.testing.assert_close(model(images), start(images), atol=1e-6, rtol=0)
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())


def test_head_only_trains_the_head_and_nothing_else() -> None:
    base = VisionTransformer(layers=1)
    _, task = load_tasks()
    model = adapt(base, task.train, Recipe("head only", None, head_rate=0.1), steps=5, seed=0)
    trained = {name for name, value in model.state_dict().items() if not torch.equal(value, base.state_dict()[name])}
    assert trained == {"head.weight", "head.bias"}


def test_differences_and_latencies() -> None:
    error, same = differences(torch.tensor([[0.0, 1], [1, 0.25]]), torch.tensor([[0.0, 1], [0, 0.5]]))
    assert (error, same) == (1.0, 0.5)
    order: list[str] = []

    def call(name: str) -> Any:
        def run(images: Tensor) -> Tensor:
            order.append(name)
            return images

        return run

    found = latencies({"a": call("a"), "b": call("b")}, torch.zeros(1), rounds=2)
    assert order == ["a", "b", "a", "b", "b", "a"]
    assert set(found) == {"a", "b"} and min(found.values()) > 0


def test_parameters_are_counted_as_plain_lora_of_the_true_rank() -> None:
    entries = [{"rank": 2, "shape": [3, 5]}, {"rank": 0, "shape": [8, 8]}, {"rank": 1, "shape": [4, 6]}]
    assert plain_parameters(entries) == 2 * 8 + 10


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "runs" / "demo"


@pytest.fixture(scope="module")
def run(out: Path) -> dict[str, Any]:
    return run_demo(out, seed=0, size=QUICK)


def test_the_folder_holds_adapter_onnx_and_both_reports(run: dict[str, Any], out: Path) -> None:
    files = {"adapter", "model.onnx", "model.onnx.report.json", "report.json", "report.html"}
    assert {path.name for path in out.iterdir()} == files
    assert json.loads((out / "report.json").read_text()) == run
    page = (out / "report.html").read_text()
    assert page.startswith("<!doctype html>") and "blocks.3.ffn.down.weight" in page


def test_the_budget_is_spent_exactly_and_counted_as_plain_lora(run: dict[str, Any]) -> None:
    found = {result["method"]: result for result in run["results"]}
    assert [result["method"] for result in run["results"]] == ["before", "head only", "LoRA", "LoRA²"]
    assert found["LoRA"]["rank"] == found["LoRA²"]["rank"] == 20
    assert found["LoRA²"]["adapter_parameters"] == sum(
        site["rank"] * sum(site["shape"]) for site in run["delivered"]["sites"] if site["r"] is not None
    )


def test_folding_and_exporting_change_nothing(run: dict[str, Any]) -> None:
    delivered = run["delivered"]
    assert delivered["verify"]["status"] == "passed"
    assert delivered["fold"]["max_error"] < 1e-4
    assert delivered["onnx"]["max_error"] < 1e-4
    assert delivered["fold"]["same_class"] == delivered["onnx"]["same_class"] == 1.0


def test_the_tables_say_what_the_run_found(run: dict[str, Any]) -> None:
    lines = demo_tables(run)["tables"]["Adapting to new digits"]["rows"]
    accuracies = {result["method"]: f"{result['accuracy']:.3f}" for result in run["results"]}
    assert {line[0]: line[1] for line in lines} == accuracies
    shown = format_demo(run)
    assert "3,072" in shown and "ONNX Runtime" in shown


def test_several_seeds_are_a_mean_and_a_standard_deviation(run: dict[str, Any]) -> None:
    twice = [{**result, "accuracy": result["accuracy"] + shift} for shift in (0.0, 0.2) for result in run["results"]]
    line = demo_tables({**run, "results": twice})["tables"]["Adapting to new digits"]["rows"][1]
    first = run["results"][1]["accuracy"]
    assert line[1] == f"{first + 0.1:.3f} ± {0.2 / 2**0.5:.3f}"


def test_differences_are_seed_by_seed(run: dict[str, Any]) -> None:
    results = [
        {**result, "seed": seed, "accuracy": 0.5 + 0.1 * seed + (gain if result["method"] == "LoRA²" else 0.0)}
        for seed, gain in ((0, 0.02), (1, 0.04))
        for result in run["results"]
    ]
    lines = demo_tables({**run, "results": results})["tables"]["Adapting to new digits"]["rows"]
    assert [line[2] for line in lines] == ["+0.000 ± 0.000", "+0.000 ± 0.000", "–", "+0.030 ± 0.010"]


@pytest.mark.parametrize("share", [1.0, 0.1])
def test_the_core_learns_at_its_share_of_the_adapters_rate(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[float, int] = {}

    def spy(model: nn.Module, optimizer: Any, *rest: Any) -> None:
        for group in optimizer.param_groups:
            seen[group["lr"]] = seen.get(group["lr"], 0) + len(group["params"])

    monkeypatch.setattr("lora2fx.demo.contestants.fit", spy)
    _, task = load_tasks()
    method = lora2fx.LoRA2(r=4, k=3, target_k=1)
    adapt(VisionTransformer(layers=1), task.train, Recipe("LoRA²", method, 0.5, 0.2, core_share=share), 10, 0)
    expected = {0.5: 2, 0.2: 5 * 2, 0.02: 5 * 3} if share == 0.1 else {0.5: 2, 0.2: 5 * 5}
    assert {round(rate, 9): count for rate, count in seen.items()} == expected


def test_tuning_gives_lora_as_many_candidates_as_lora2() -> None:
    counts = Counter(candidate.name for candidate in candidates())
    assert counts["LoRA"] == counts["LoRA²"] > 0
    assert {recipe.name for recipe in RECIPES} == set(counts)
    assert all(recipe in candidates() for recipe in RECIPES)


def test_tuning_scores_held_back_training_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora2fx.demo.tuning.FULL", replace(QUICK, base_steps=3))
    recipe = Recipe("head only", None, 0.1)
    found = tune_seed(4, 3, [recipe])
    _, task = load_tasks()
    hits = found[0] * len(hold_back(task.train, 0.25, 4).test)
    assert hits == pytest.approx(round(hits), abs=1e-9)
    assert found == tune_seed(4, 3, [recipe])


def test_an_adapter_folder_loads_onto_the_same_base(run: dict[str, Any], out: Path) -> None:
    own, new = load_tasks()
    with torch.random.fork_rng(devices=[]):
        base = with_fresh_head(train_base(own.train, QUICK.base_steps, 0), 0)
    lora2fx.load(base, out / "adapter")
    assert accuracy(base.eval(), new.test) == run["results"][-1]["accuracy"]


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(Lora2fxError, match="is a file; name a folder"):
        run_demo(tmp_path / "taken")

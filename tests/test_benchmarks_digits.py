"""The digits benchmark: LoRA learns as PEFT's does, and each variant of the ablation differs in what it says."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import lora2fx
from benchmarks.quality.contestants import Ours, Outside, Setting
from benchmarks.quality.digits import ablation
from benchmarks.quality.digits.altered import Paced, Placed, Scored, Truncated, truncate
from benchmarks.quality.digits.comparison import choose_rates
from benchmarks.quality.digits.task import TARGETS, Classifier, run_digits
from benchmarks.quality.digits.variants import default, variants
from benchmarks.quality.fitting import fit
from lora2fx import LoRA
from lora2fx.program import program_of

KINDS = (
    "start K₀ 4",
    "pruning none, all columns in the first weight",
    "columns scored by both factors",
    "rate of λ 3 x",
    "pruning ΔW's singular values, once",
)


def batches(steps):
    generator = torch.Generator().manual_seed(1)
    draw = lambda: {"images": torch.rand(16, 64, generator=generator), "labels": torch.arange(16) % 10}  # noqa: E731
    return [draw() for _ in range(steps)]


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_from_the_same_factors_at_the_same_rate_lora_is_pefts() -> None:
    setting = Setting(TARGETS, (), 25, 0.02, 0.0)
    torch.manual_seed(0)
    base = Classifier().requires_grad_(False)
    twin = Classifier().requires_grad_(False)
    twin.load_state_dict(base.state_dict())
    ours = Ours("", LoRA(r=2, lora_alpha=4)).begin(base, setting, lambda model: 0.0)
    theirs = Outside("", 2).begin(twin, setting, lambda model: 0.0)
    pairs = [
        (base.get_submodule(f"{path}.lora2fx_weight"), theirs.model.get_submodule(f"model.{path}")) for path in TARGETS
    ]
    with torch.no_grad():
        for own, other in pairs:
            own.A.copy_(other.lora_A["default"].weight)
    for trainee in (ours, theirs):
        fit(trainee, batches(25), 25)
    for own, other in pairs:
        assert own.weight_delta().norm() > 0.1
        torch.testing.assert_close(own.weight_delta(), other.get_delta_weight("default"), atol=2e-4, rtol=0)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_pefts_adalora_is_regularised() -> None:
    trainee = Outside("", 1, 3).begin(Classifier(), Setting(TARGETS, (), 25, 0.02, 0.0), lambda model: 0.0)
    factors = [p for name, p in trainee.model.named_parameters() if "lora_A" in name or "lora_B" in name]
    with torch.no_grad():
        grams = [p @ p.T if p.shape[0] == 3 else p.T @ p for p in factors]
        penalty = sum((gram - torch.eye(3)).norm() for gram in grams) / len(grams)
        [batch] = batches(1)
        task = torch.nn.functional.cross_entropy(trainee.model(**batch).logits, batch["labels"])
        total = trainee.model(**batch).loss
    assert len(factors) == 2 * len(TARGETS)
    assert total.item() == pytest.approx(task.item() + 0.5 * penalty.item(), rel=1e-6)


@pytest.mark.parametrize("columns", ablation.BUDGETS)
def test_a_variant_changes_what_it_names_and_nothing_else(columns) -> None:
    known = variants(columns)
    usual = dataclasses.asdict(default(columns))
    assert next(iter(known)) == f"→{columns} default"
    for name, variant in list(known.items())[1:]:
        method = dataclasses.asdict(variant.contestant.method)
        changed = {key for key in method if method[key] != usual.get(key)}
        special = isinstance(variant.contestant, Paced | Placed | Truncated) or isinstance(
            variant.contestant.method, Scored
        )
        assert len(changed) >= 1 or special or "warm-up" in name, name
        assert len(changed - {"target_k", "lora_alpha"}) <= 2 or "λ instead" in name, (name, changed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_variant_of_each_kind_runs(kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.quality.digits.task.BASE_STEPS", 20)
    variant = variants(1)[f"→1 {kind}"]
    found = run_digits(variant.contestant, 0.02, 0, "tune", steps=20)
    assert 0 <= found["score"] <= 1
    assert sum(found["ranks"].values()) == 3


def test_a_factor_is_paced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Classifier()
    setting = Setting(TARGETS, (), 20, 0.02, 0.0)
    trainee = Paced("", default(1), {"v": 3.0, "U": 3.0, "lam": 0.5}).begin(model, setting, lambda model: 0.0)
    rates = {id(p): group["lr"] for group in trainee.optimizer.param_groups for p in group["params"]}
    for adapter in program_of(model, "test").adapters.values():
        own = {name: rates[id(parameter)] for name, parameter in adapter.named_parameters()}
        assert own == pytest.approx({"u": 0.02, "v": 0.06, "U": 0.06, "V": 0.02, "lam": 0.01})


def test_truncation_keeps_the_largest_singular_values_of_all() -> None:
    torch.manual_seed(3)
    model = lora2fx.transform(Classifier().double(), TARGETS, default(1, target_k=None), seed=0)
    adapters = list(program_of(model, "test").adapters.values())
    for scale, adapter in zip((1, 3, 0.2), adapters, strict=True):
        torch.nn.init.normal_(adapter.V, std=scale)
    before = [adapter.delta().detach() for adapter in adapters]
    values = torch.cat([torch.linalg.svdvals(delta)[:3] for delta in before]).sort(descending=True).values
    truncate(adapters, 9)
    for delta, adapter in zip(before, adapters, strict=True):
        torch.testing.assert_close(adapter.delta().detach(), delta, atol=1e-12, rtol=0)
    truncate(adapters, 4)
    left = sum((delta - adapter.delta()).square().sum() for delta, adapter in zip(before, adapters, strict=True))
    assert left.item() == pytest.approx(values[4:].square().sum().item())  # Eckart and Young
    assert sum(int(adapter.column_mask.sum()) for adapter in adapters) == 4


def record(name, seed, score, rate=0.02):
    sizes = {"folded": 10, "seconds": 0.002}
    return {"task": "digits", "contestant": name, "rate": rate, "seed": seed, "score": score, "use": "tune"} | sizes


def test_the_ablation_s_table_compares_each_at_its_best_rate() -> None:
    usual = [record("→1 default", seed, score) for seed, score in enumerate((0.8, 0.9))]
    slower = [record("→1 default", seed, 0.5, 0.04) for seed in (0, 1)]
    scaled = [record("→1 init gaussian", seed, score, 0.04) for seed, score in enumerate((0.1, 0.1))]
    scaled += [record("→1 init gaussian", seed, score) for seed, score in enumerate((0.82, 0.92))]
    single = [record("→1 start K₀ 4", seed, 0.6, 0.04) for seed in (0, 1)]
    lines = ablation.table([*usual, *slower, *scaled, *single], 1).splitlines()
    assert lines[2].split() == ["default", "85.0", "±", "5.0", "0.02", "10"]
    assert lines[3].split() == ["start", "K₀", "4", "60.0", "±", "0.0", "+10.0", "±", "0.0", "0.04", "10"]
    assert lines[4].split() == ["init", "gaussian", "87.0", "±", "5.0", "+2.0", "±", "0.0", "0.02", "10"]


def test_the_ablation_resumes_and_is_printed(tmp_path, monkeypatch, capsys) -> None:
    ran = []

    def run(contestant, rate, seed, use, warm_up):
        ran.append((seed, rate))
        return {"score": 0.5 + seed / 1000, "seconds": 0.001, "folded": 1}

    monkeypatch.setattr(ablation, "run_digits", run)
    out = tmp_path / "runs.jsonl"
    for seeds in ("1", "2"):
        ablation.main(["--seeds", seeds, "--budgets", "1", "--out", str(out)])
    assert len(ran) == 2 * sum(len(variant.rates) for variant in variants(1).values())
    assert {seed for seed, _ in ran} == {200, 201}
    assert capsys.readouterr().out.rstrip().endswith(out.with_suffix(".txt").read_text().splitlines()[-1])


def test_close_rates_are_tried_on_further_seeds(tmp_path, monkeypatch) -> None:
    ran = []

    def run(job):
        ran.append(job)
        bad = {0.01: 0.3, 0.02: 0.0, 0.04: 0.0, 0.08: 0.4}[job.rate]
        noise = 0.1 * ((job.seed + (job.rate == 0.04)) % 2) if job.seed < 106 else 0.1 * (job.rate == 0.02)
        return {"score": 0.8 - bad - noise}

    monkeypatch.setattr("benchmarks.quality.digits.comparison.run_job", run)
    assert choose_rates(["BitFit"], tmp_path / "runs.jsonl", 1) == {"BitFit": 0.04}
    assert {job.rate for job in ran if job.seed >= 106} == {0.02, 0.04}
    assert len(ran) == 4 * 6 + 2 * 3

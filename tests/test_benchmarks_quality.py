"""The quality benchmark's own parts: resuming, choosing rates, intervals, and one short run of every contestant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from scipy import stats

from benchmarks.quality.comparing import best_rates, compare, contenders, paired_interval, standard_error, steady_rates
from benchmarks.quality.digits.contestants import AGAINST, CONTESTANTS
from benchmarks.quality.digits.task import HELD_SHARE, TARGETS, digits, run_digits
from benchmarks.quality.store import Job, read_runs, run_jobs

JOBS = [Job("t", name, 0.1, seed, "test") for name in ("a", "b") for seed in (0, 1)]


def test_what_was_cut_off_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path, ran = tmp_path / "runs.jsonl", []

    def run(job):
        ran.append(job)
        return {"score": job.seed}

    run_jobs(JOBS[:2], path, run, 1, "first")
    whole = path.read_text()
    path.write_text(whole + '{"task": "t", "contes')
    found = run_jobs(JOBS, path, run, 1, "second")
    assert ran == JOBS
    assert [record["score"] for record in found.values()] == [0, 1, 0, 1]
    assert path.read_text().startswith(whole)
    assert len(path.read_text().splitlines()) == len(read_runs(path)) == 4
    assert json.loads(path.read_text().splitlines()[-1])["contestant"] == "b"


def test_a_failing_run_keeps_those_before_it(tmp_path: Path) -> None:
    def run(job):
        if job.seed:
            raise ValueError("diverged")
        return {"score": 1}

    with pytest.raises(ValueError, match="diverged"):
        run_jobs(JOBS, tmp_path / "runs.jsonl", run, 1, "label")
    assert list(read_runs(tmp_path / "runs.jsonl")) == JOBS[:1]


def test_paired_intervals_are_student_s() -> None:
    a, b = [0.9, 0.8, 0.95, 0.7], [0.8, 0.82, 0.8, 0.65]
    middle, half = paired_interval(a, b)
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (middle - half, middle + half) == pytest.approx((low, high))
    assert standard_error(a) == pytest.approx(stats.sem(a))


def record(name, rate, seed, score, use="test"):
    sizes = {"before": 30, "after": 20, "folded": 10, "seconds": 0.002}
    return {"task": "t", "contestant": name, "rate": rate, "seed": seed, "score": score, "use": use} | sizes


def test_the_rate_with_the_best_mean_is_chosen_of_equal_ones_the_lowest() -> None:
    scores = {0.1: (0.5, 0.7), 0.2: (0.9, 0.3), 0.4: (0.2, 0.2)}
    tuned = [record("a", rate, seed, s) for rate, pair in scores.items() for seed, s in enumerate(pair)]
    assert best_rates(tuned) == {("t", "a"): 0.1}


def test_a_rate_stays_open_while_it_is_less_than_two_standard_errors_behind() -> None:
    scores = {0.1: (0.5, 0.7, 0.6), 0.2: (0.8, 0.5, 0.6), 0.4: (0.2, 0.4, 0.3), 0.8: (0.6, 0.4, 0.6)}
    tuned = [record("a", rate, seed, s) for rate, own in scores.items() for seed, s in enumerate(own)]
    assert best_rates(tuned) == {("t", "a"): 0.2}
    assert contenders([*tuned, record("b", 0.4, 0, 0.1)]) == {
        *(("t", "a", rate) for rate in (0.1, 0.2, 0.8)),  # behind by .033 ± .12, 0, .1 ± .058 and .333 ± .12
        ("t", "b", 0.4),
    }
    assert steady_rates(tuned) == {("t", "a"): 0.1}


def test_the_table_pairs_by_seed() -> None:
    records = [record("LoRA", 0.1, 0, 0.5), record("LoRA", 0.1, 1, 0.7), record("x", 0.2, 1, 0.8)]
    lines = compare([*records, record("x", 0.2, 0, 0.6)], {"x": "LoRA"}).splitlines()
    assert lines[3].split("  ")[0] == "x"
    assert "70.0 ± 10.0" in lines[3] and "+10.0 ± 0.0 to LoRA" in lines[3] and "30" in lines[3]


def test_tuning_never_sees_a_test_example() -> None:
    train, test = digits()
    rows = {image.numpy().tobytes() for image in train.images}
    assert not rows & {image.numpy().tobytes() for image in test.images}
    kept, held = train.split(HELD_SHARE, 3)
    assert len(kept.labels) + len(held.labels) == len(train.labels)
    image = train.images[0].reshape(8, 8)
    assert torch.equal(train.turned().images[0].reshape(8, 8), 1 - torch.rot90(image))


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("name", CONTESTANTS)
def test_every_contestant_runs_and_is_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.quality.digits.task.BASE_STEPS", 20)
    found = run_digits(CONTESTANTS[name], 0.01, 0, "tune", steps=20)
    assert 0 <= found["score"] <= 1 and found["seconds"] > 0
    sizes = dict(zip((f"{target}.weight" for target in TARGETS), (192, 256, 256), strict=True))
    assert found["folded"] == sum(rank * sizes[weight] for weight, rank in found["ranks"].items())
    assert found["before"] >= found["after"] >= 0
    if "→" in name:
        assert sum(found["ranks"].values()) <= 3 * int(name.rpartition("→")[2].partition(",")[0])
    assert AGAINST[name] in CONTESTANTS

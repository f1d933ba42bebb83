"""What the demo prints and shows: its run as a title, a summary and two tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import mean, stdev
from typing import Any

from lora2fx.reports import format_table


def plain_parameters(sites: Sequence[Mapping[str, Any]]) -> int:
    """What the sites' updates cost as plain LoRA of their true ranks: Σ rank · (in + out). The fair comparison."""
    return sum(site["rank"] * sum(site["shape"]) for site in sites)


def _spread(values: Sequence[float], digits: int) -> str:
    text = f"{mean(values):.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text


def _difference(results: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> str:
    """By how much the first beat the second, seed by seed: mean ± standard error."""
    reference = {result["seed"]: result["accuracy"] for result in other}
    pairs = [result["accuracy"] - reference[result["seed"]] for result in results if result["seed"] in reference]
    text = f"{mean(pairs):+.3f}"
    return f"{text} ± {stdev(pairs) / sqrt(len(pairs)):.3f}" if len(pairs) > 1 else text


def _row(method: str, results: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line of the accuracy table: mean ± standard deviation over the seeds."""

    def cell(key: str) -> str:
        values = [result.get(key) for result in results]
        known = [value for value in values if value is not None]
        return (f"{mean(known):,.0f}" if any(known) else "–") if known else "–"

    spent = [cell("adapter_parameters"), cell("rank"), cell("active")]
    difference = "–" if results == reference else _difference(results, reference)
    return [method, _spread([result["accuracy"] for result in results], 3), difference, *spent]


def _accuracy_table(run: Mapping[str, Any]) -> dict[str, Any]:
    methods = dict.fromkeys(result["method"] for result in run["results"])
    found = {method: [result for result in run["results"] if result["method"] == method] for method in methods}
    rows = [_row(method, results, found["LoRA"]) for method, results in found.items()]
    header = ["method", "accuracy on 5–9", "against LoRA", "adapter parameters", "rank of ΔW, all sites", "active λ"]
    return {"header": header, "rows": rows}


def _delivery_table(delivered: Mapping[str, Any]) -> dict[str, Any]:
    fold, onnx, latency = delivered["fold"], delivered["onnx"], delivered["latency_ms"]
    rows = [
        ["adapters in place", "–", "–", f"{latency['unmerged']:.2f}"],
        ["folded", f"{fold['max_error']:.1e}", f"{fold['same_class']:.1%}", f"{latency['merged']:.2f}"],
        ["ONNX Runtime", f"{onnx['max_error']:.1e}", f"{onnx['same_class']:.1%}", f"{latency['onnx']:.2f}"],
    ]
    header = ["the LoRA² model", "largest error against the line above", "same class", "ms for 32 images"]
    return {"header": header, "rows": rows}


def demo_tables(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run's `title`, `summary` and `tables`, as `render_html` takes them."""
    size, examples = run["size"], run["examples"]
    count = size["seeds"]
    summary = (
        f"A vision transformer of {run['base_parameters']:,} parameters, trained from scratch on the digits 0–4"
        f" ({run['base_accuracy']:.1%} of its test images right), adapted to 5–9 with {examples['train']} images and"
        f" tested on {examples['test']} others; {count} seed{'s' if count > 1 else ''} of {size['steps']} steps,"
        f" {run['seconds']:.0f} s in all. Accuracies: mean ± standard deviation over the seeds; differences seed by"
        " seed: mean ± standard error."
    )
    tables = {
        "Adapting to new digits": _accuracy_table(run),
        "From training to ONNX Runtime": _delivery_table(run["delivered"]),
    }
    return {"title": "lora2fx demo: digits", "summary": summary, "tables": tables}


def format_demo(run: Mapping[str, Any]) -> str:
    """The run as text for a terminal."""
    page = demo_tables(run)
    parts = [page["summary"]]
    parts += [f"{caption}\n{format_table(**table)}" for caption, table in page["tables"].items()]
    return "\n\n".join(parts)

"""`python -m tests.mutants [allocator|fold|verify]`: changes the sources one place at a time, and runs their tests.

A change that no test notices is listed, unless `tests/MUTANTS.md` says why it is none. Which tests run which lines is
recorded once; a mutant then runs only those that reach its lines: the one that noticed it the last time, those that
noticed others, the quickest. Each is a fork of one process that has imported the libraries: torch starts only once.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.abc import Loader, MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.mutations import ROOT, Mutant, mutants, source_path

EXPLAINED = Path(__file__).with_name("MUTANTS.md")
NOTICED = ROOT / "build" / "mutants"
"""By part, the test that noticed each mutant the last time: a guess of what to run first, never trusted."""
SECONDS = 60
"""For a test; a mutant that takes longer is noticed too."""
PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "allocator": (
        ("lora2fx.training.allocator",),
        ("training_allocator", "training_groups", "training_driver", "methods_adalora", "properties", "first_hours"),
    ),
    "fold": (
        ("lora2fx.passes.fold", "lora2fx.passes.merging"),
        ("fold", "fold_rounding", "bad_use", "baselines", "quantised", "faults_compute"),
    ),
    "verify": (
        ("lora2fx.passes.verify", "lora2fx.passes.checks"),
        ("verify", "quantised"),
    ),
}
"""By name: the modules that are changed, and their tests."""


@dataclass
class Recorder:
    """How long each test takes, and which lines of some modules it runs; those run by importing have the name ""."""

    modules: Sequence[str]
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from coverage import Coverage

        paths = [str(source_path(module).resolve()) for module in self.modules]
        self.coverage = Coverage(data_file=None, config_file=False, include=paths)
        self.coverage.set_option("run:core", "ctrace")  # the only one that tells tests apart
        self.coverage.start()
        for module in self.modules:
            importlib.import_module(module)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(item.nodeid)
        start = time.monotonic()
        yield
        self.seconds[item.nodeid] = time.monotonic() - start

    def found(self) -> dict[str, Any]:
        self.coverage.stop()
        data = self.coverage.get_data()
        lines = {module: data.contexts_by_lineno(str(source_path(module).resolve())) for module in self.modules}
        return {"seconds": self.seconds, "lines": lines}


@dataclass
class Chosen:
    """Runs these tests only, in this order, and says which one failed."""

    tests: Sequence[str]
    failed: str = ""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        order = {test: place for place, test in enumerate(self.tests)}
        items[:] = sorted((item for item in items if item.nodeid in order), key=lambda item: order[item.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed = report.nodeid if report.failed else self.failed

    def found(self) -> str:
        return self.failed


class Replaced(MetaPathFinder, Loader):
    """Imports one module from a source of ours."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.util.spec_from_loader(name, self) if name == self.mutant.module else None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.mutant.source, self.mutant.module, "exec"), module.__dict__)


def _tested(plugin: Recorder | Chosen, files: Sequence[str], answer: int) -> None:
    """In a process of its own: writes what the plugin found, and exits as pytest does."""
    options = ["-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--timeout", str(SECONDS)]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what the parent has imported
    code = pytest.main([*options, *(str(ROOT / file) for file in files)], [plugin])
    with os.fdopen(answer, "w") as file:
        json.dump(plugin.found(), file)
    os._exit(int(code))


def forked(prepare: Callable[[], Recorder | Chosen], files: Sequence[str], seconds: float) -> tuple[int, Any]:
    """pytest's exit code, negative where it was killed, and what the plugin found, None where it found nothing."""
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        os.close(reader)
        os.setpgid(0, 0)
        try:
            _tested(prepare(), files, writer)
        finally:
            os._exit(70)
    os.close(writer)
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(process, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    with os.fdopen(reader) as file:
        text = file.read()
    status = os.waitpid(process, 0)[1]
    signal.setitimer(signal.ITIMER_REAL, 0)
    return os.waitstatus_to_exitcode(status), json.loads(text) if text else None


@dataclass(frozen=True)
class Tests:
    """The tests of a part: how long each takes, and by module and line those that run it."""

    seconds: dict[str, float]
    lines: dict[str, dict[str, list[str]]]

    def reaching(self, mutant: Mutant) -> list[str]:
        """Those that run the mutant's lines, the quickest first; all of its module's where an import runs them."""
        lines = self.lines[mutant.module]
        found = {test for line in mutant.lines for test in lines.get(str(line), [])}
        if "" in found:
            found = {test for tests in lines.values() for test in tests} - {""}
        return sorted(found, key=lambda test: self.seconds[test])

    def notices(self, mutant: Mutant, tests: Sequence[str]) -> tuple[bool, str]:
        """Whether one of these tests fails with the mutant, or an import does, and which."""

        def prepare() -> Chosen:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1), os.dup2(quiet, 2)
            sys.meta_path.insert(0, Replaced(mutant))
            return Chosen(tests)

        files = dict.fromkeys(test.partition("::")[0] for test in tests)
        limit = SECONDS + 3 * sum(self.seconds[test] for test in tests)
        code, failed = forked(prepare, list(files), limit) if tests else (0, None)
        if code == pytest.ExitCode.NO_TESTS_COLLECTED:
            sys.exit(f"{mutant.name}: its tests are not there any more.")
        return code != 0, failed or ""


def recorded(modules: Sequence[str], files: Sequence[str]) -> Tests:
    """Runs all tests without a change."""
    code, found = forked(lambda: Recorder(modules), [f"tests/test_{file}.py" for file in files], 20 * SECONDS)
    if code:
        sys.exit("A test fails without any change; nothing can be told from it.")
    return Tests(**found)


def explained(modules: Sequence[str]) -> set[str]:
    """The mutants of these modules that `MUTANTS.md` explains."""
    found = re.findall(r"^- (`([^`]+)` \S+: `[^`]+`)", EXPLAINED.read_text(encoding="utf-8"), re.MULTILINE)
    return {name for name, module in found if f"lora2fx.{module}" in modules}


def run(part: str) -> int:
    """Every mutant of a part; how many survive without a reason, or are explained without need."""
    modules, files = PARTS[part]
    tests, known, survived, total = recorded(modules, files), explained(modules), set[str](), 0
    journal = NOTICED / f"{part}.json"
    before: dict[str, str] = defaultdict(str, json.loads(journal.read_text()) if journal.exists() else {})
    journal.parent.mkdir(parents=True, exist_ok=True)
    for mutant in (mutant for module in modules for mutant in mutants(module)):
        total += 1
        reaching = tests.reaching(mutant)
        guess = [test for test in reaching if test == before[mutant.name]]
        noticed, by = tests.notices(mutant, guess)
        if not noticed:
            noticed, by = tests.notices(mutant, sorted(reaching, key=lambda test: test not in before.values()))
        if noticed:
            before[mutant.name] = by
            journal.write_text(json.dumps(before, indent=0))
            continue
        survived.add(mutant.name)
        if mutant.name not in known:
            print(f"survives {len(reaching)} tests, line {mutant.lines.start}: {mutant.name}", flush=True)
    for name in sorted(known - survived):
        print(f"explained, but noticed or not there: {name}")
    print(f"{part}: {total} mutants, {total - len(survived)} noticed, {len(survived & known)} explained,", end=" ")
    print(f"{len(survived - known)} not", flush=True)
    return len(survived ^ known)


def main() -> int:
    """The parts that are named, or all."""
    import hypothesis.strategies  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    return min(1, sum([run(part) for part in sys.argv[1:] or PARTS]))


if __name__ == "__main__":
    sys.exit(main())

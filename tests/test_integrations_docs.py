"""The page on training: every example on it runs as it stands, in small and on the CPU."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import BertConfig, BertForSequenceClassification

import lora2fx
from tests import distributed_tasks
from tests.loops import forget

PAGE = Path(__file__).parents[1] / "docs" / "training.md"
TEXT = PAGE.read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
STEPS = 16


@pytest.fixture(autouse=True)
def _aside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    forget()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning|torch.utils.data|accelerate")
        warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")
        yield
    forget()


def example(words: str) -> str:
    """The one example that holds the words, for the CPU."""
    (found,) = [code for code in EXAMPLES if words in code]
    return found.replace('"cuda"', '"cpu"').replace("GradScaler()", 'GradScaler("cpu")')


def run(code: str, **given: Any) -> dict[str, Any]:
    exec(compile(code, str(PAGE), "exec"), given)
    return given


def bert() -> BertForSequenceClassification:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=50, **sizes))


def adapted() -> BertForSequenceClassification:
    return lora2fx.transform(bert(), ["query", "ffn"], lora2fx.LoRA2(r=8, k=4, target_k=1), seed=0)


def batches(rows: int = 4) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 50, (STEPS, rows, 9), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": own, "labels": own[:, 0] % 2} for own in ids]


def dataset() -> list[dict[str, torch.Tensor]]:
    return [{name: value[0] for name, value in batch.items()} for batch in batches(1)]


def adamw(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW(lora2fx.param_groups(model, 1e-3))


def test_a_plain_loop_and_its_numbers(capsys):
    model = bert()
    names = set(model.state_dict())
    found = run(example("clip_grad_norm_"), model=model, batches=batches())
    assert set(found["model"].state_dict()) == names
    given = {"attachment": lora2fx.attach(adapted_model := adapted(), adamw(adapted_model), STEPS)}
    run(example("import log_values"), **given)
    assert "lora2fx/columns_active" in capsys.readouterr().out


def test_mixed_precision():
    model = adapted()
    found = run(
        example("GradScaler()"), torch=torch, lora2fx=lora2fx, model=model, optimizer=adamw(model), batches=batches()
    )
    assert found["attachment"].step + found["attachment"].skipped == STEPS
    assert found["attachment"].active == 3


def test_the_trainer():
    code = example("from transformers import Trainer")
    assert "max_steps=100" in code
    rest = '"out", use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, max_steps=16'
    model = adapted()
    run(code.replace('"out", max_steps=100', rest), model=model, dataset=dataset())
    lora2fx.fold(model)


def test_accelerate():
    model = adapted()
    code = example("from accelerate import").replace("Accelerator(", "Accelerator(cpu=True, ")
    loader = torch.utils.data.DataLoader(dataset() * 8, 4)
    found = run(code, torch=torch, lora2fx=lora2fx, model=model, optimizer=adamw(model), loader=loader)
    assert found["attachment"].step == found["attachment"].total_steps == 16
    lora2fx.fold(model)


def test_lightning():
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = adapted()

        def training_step(self, batch, index):
            return self.model(**batch).loss

        def configure_optimizers(self):
            return adamw(self.model)

    code = example("import lightning")
    quiet = "max_steps=16, accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False)\n"
    module, loader = Module(), torch.utils.data.DataLoader(dataset() * 4, 4)
    run(code.replace("max_steps=100)\n", quiet), lora2fx=lora2fx, module=module, loader=loader)
    lora2fx.fold(module)


def test_sharding(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = distributed_tasks.Blocks()
        found = run(example("import fully_shard"), torch=torch, lora2fx=lora2fx, model=model)
        run(example('lora2fx.save(model, "adapter/")'), **found)
    finally:
        dist.destroy_process_group()
    fresh = lora2fx.load(distributed_tasks.Blocks(), tmp_path / "adapter", allow_other_base=True)
    assert lora2fx.report(fresh).totals["active"] == 4 * 8


def test_resuming(tmp_path):
    code = example("import load_checkpoint")

    def life(count: int) -> BertForSequenceClassification:
        model = adapted().train()
        optimizer = adamw(model)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=STEPS)
        given = {"model": model, "optimizer": optimizer, "schedule": schedule, "lora2fx": lora2fx}
        assert "total_steps=len(batches)" in code
        run(code.replace("len(batches)", str(STEPS)), batches=batches()[:count], **given)
        return model

    torch.manual_seed(7)
    whole = life(STEPS)
    (tmp_path / "run.pt").unlink()
    torch.manual_seed(7)
    life(9)
    again = life(STEPS)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_the_page_names_what_there_is():
    root = PAGE.parents[1]
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (PAGE.parent / link).resolve().is_relative_to(root)
        assert (PAGE.parent / link).exists()

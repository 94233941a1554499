"""What general knowledge a model keeps: its loss on held-out text that no client trains on, and tasks."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from fedgraft.data.general_text import general_texts
from fedgraft.evaluation import harness
from fedgraft.evaluation.choices import InUse, accuracy, as_it_stands, judge
from fedgraft.evaluation.settings import EvaluationSettings
from fedgraft.evaluation.tasks import load_tasks
from fedgraft.moe.load import Base
from fedgraft.training.fit import autocast

WINDOW = 512
_untouched: WeakKeyDictionary[Any, dict[Any, dict[str, float]]] = WeakKeyDictionary()  # a frozen base answers every client alike


def windows(tokenizer: Any, tokens: int) -> Tensor:
    """[N, WINDOW] windows over the shipped text, N = tokens / WINDOW rounded up, documents taken in turn."""
    wanted = max(1, -(-tokens // WINDOW))
    ids: list[int] = []
    for text in general_texts():
        ids += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= wanted * WINDOW:
            break
    count = min(wanted, len(ids) // WINDOW)
    return torch.tensor(ids[: count * WINDOW]).view(count, -1)


@torch.no_grad()
def general_loss(base: Base, tokens: int, precision: str, in_use: InUse = as_it_stands) -> float:
    """Mean nats per token over about `tokens` tokens of general text, of the model that `in_use` makes of the base.

    A window of the text counts as a prompt.
    """
    losses = []
    for batch in windows(base.tokenizer, tokens).split(8):
        ids = batch.to(base.device)
        with in_use(batch.tolist()), autocast(precision, base.device):
            logits = base.model(input_ids=ids, use_cache=False).logits
        losses.append(F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"))
    return float(torch.cat(losses).mean())


def check_tasks(settings: EvaluationSettings, row_wise: bool = False) -> None:
    """Refuse tasks that could not be asked after training, of a method that predicts `row_wise` where it does.

    Raises:
        ValueError: no such task, a row that is none, lm-eval not installed or not able to ask, or a task that both ways have.
    """
    if row_wise and settings.lm_eval:
        raise ValueError(
            "evaluation.lm_eval: this method blends every row by its prompt, which lm-eval does not tell apart from the answer; "
            "use evaluation.tasks, or leave it out"
        )
    own = {task.name for task in load_tasks(settings.tasks, settings.split)}
    if both := own & harness.check(settings.lm_eval):
        raise ValueError(
            f"evaluation: tasks and lm_eval both have a task {min(both)!r}, whose figures could not be told apart; rename the file"
        )


def task_figures(
    base: Base, settings: EvaluationSettings, precision: str, in_use: InUse = as_it_stands, untouched: bool = False
) -> dict[str, float]:
    """`<task>/<metric>` for all tasks of the settings, by the model that `in_use` makes of the base; `untouched` it is measured once."""
    known = _untouched.setdefault(base.model, {}) if untouched else {}
    key = (settings.tasks, settings.lm_eval, settings.split, settings.task_rows, precision)
    if key not in known:
        figures: dict[str, float] = {}
        for task in load_tasks(settings.tasks, settings.split, settings.task_rows):
            judged = judge(base, task, settings.batch_size, precision, in_use)
            figures |= {f"{task.name}/{metric}": value for metric, value in accuracy(judged, task.lettered).items()}
        if settings.lm_eval:
            with in_use([]):  # without prompts: see `check_tasks`
                figures |= harness.harness_figures(base, settings.lm_eval, settings.batch_size, settings.task_rows, precision)
        known[key] = figures
    return dict(known[key])

"""lm-eval's tasks on the live model (extra `eval`): its own names, which may need the hub, and local YAML files."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedgraft.moe.load import Base

YAML = {".yaml", ".yml"}
MISSING = "evaluation.lm_eval: the package lm-eval is not installed; pip install 'fedgraft[eval]', or use evaluation.tasks"


def check(sources: Sequence[str]) -> set[str]:
    """Load the tasks once, before anything is trained; whoever names tasks of the hub needs it here. Returns their names.

    Raises:
        ValueError: lm-eval is not installed, there is no such task or file, or its rows cannot be had.
    """
    if not sources:
        return set()
    if find_spec("lm_eval") is None:
        raise ValueError(MISSING)
    try:
        with _quietly():
            loaded = _loaded(tuple(sources))
    except Exception as error:  # whatever datasets and the hub raise; a wrong name or file is the user's in any case
        raise ValueError(
            f"evaluation.lm_eval: {', '.join(sources)}: cannot be loaded ({type(error).__name__}: {error}); "
            "a name must be one of lm-eval's tasks and needs the hub or its cache, a file must be a task in YAML"
        ) from error
    return {*loaded["tasks"], *loaded["groups"]}


def harness_figures(base: Base, sources: Sequence[str], batch_size: int, rows: int | None, precision: str) -> dict[str, float]:
    """lm-eval's metrics `<task>/<metric>` of the model as it stands, grafts in use included.

    Of a group (like mmlu) the group's own figures, where it has any.
    """
    results = evaluate(live_model(base, batch_size, precision), sources, rows)
    inner = {child for children in results.get("group_subtasks", {}).values() for child in children}
    every = {**results["results"], **results.get("groups", {})}
    grouped = {name: metrics for name, metrics in every.items() if name not in inner and _numbers(metrics)} or every
    return {f"{name}/{metric}": value for name, metrics in grouped.items() for metric, value in _numbers(metrics).items()}


def evaluate(model: Any, sources: Sequence[str], rows: int | None = None, samples: bool = False) -> dict[str, Any]:
    """What `lm_eval.evaluate` returns for a model of `live_model`; with `samples` also each row's answer.

    `lm_eval.simple_evaluate(live_model(...), tasks=...)` gives the same figures, with facts about the machine that take seconds to gather.
    """
    with _quietly():
        import lm_eval

        results = lm_eval.evaluate(model, task_dict=_loaded(tuple(sources)), limit=rows, bootstrap_iters=0, log_samples=samples)
    assert results is not None, "only other ranks than 0 get none"
    return dict(results)


def live_model(base: Base, batch_size: int, precision: str) -> Any:
    """The loaded model as an object of lm-eval (`lm_eval.api.model.LM`): it answers with the grafts that are in use when it is asked."""
    with _quietly():
        from lm_eval.models.huggingface import HFLM

        tokenizer = base.tokenizer if base.tokenizer.pad_token_id is not None else copy.deepcopy(base.tokenizer)  # it would set one
        mixed = "bfloat16" if precision == "bf16" else None
        model = HFLM(
            pretrained=base.model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            softmax_dtype="float32",
            mixed_precision_dtype=mixed,
        )
        model._device = base.device  # where inputs go; the model may lie on several
    return model


@lru_cache(maxsize=1)
def _loaded(sources: tuple[str, ...]) -> dict[str, Any]:
    """The tasks with their rows, kept for all clients and models; few-shot examples as `simple_evaluate` takes them."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.tasks import TaskManager

    files = {source: Path(source).expanduser().resolve() for source in sources if Path(source).suffix in YAML}
    for path in files.values():
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
    manager = TaskManager(include_defaults=len(files) < len(sources))  # reading all its own takes seconds
    loaded = dict(manager.load([str(files.get(source, source)) for source in sources]))
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    return loaded


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """`acc,none` -> `acc`, `exact_match,strict-match` -> `exact_match.strict-match`; without standard errors and texts."""
    found = {}
    for key, value in metrics.items():
        metric, comma, filtered = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            found[metric if filtered == "none" else f"{metric}.{filtered}"] = float(value)
    return found


@contextmanager
def _quietly() -> Iterator[None]:
    """No remarks and no bars of lm-eval and datasets meanwhile; a run has its own."""
    from tqdm.std import tqdm

    before, logger = tqdm.__init__, logging.getLogger("lm_eval")
    level = logger.level

    def hidden(bar: Any, *arguments: Any, **options: Any) -> None:
        before(bar, *arguments, **{**options, "disable": True})

    tqdm.__init__ = hidden
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        tqdm.__init__ = before
        logger.setLevel(level)

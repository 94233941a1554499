"""What lm-eval itself answers on rows that ship, by the embedded base; kept, since lm-eval is too large to be installed for every test run.

    python -m tests.evaluation.reference_lm_eval       # with the extra `eval`; writes lm_eval_reference.json (made with lm-eval 0.4.13)

The YAML files are lm-eval's own `arc_easy` and `mmlu_*` tasks but for where the rows come from.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fedgraft.data.example import read_rows
from fedgraft.evaluation import harness
from fedgraft.evaluation.tasks import SHIPPED
from fedgraft.moe.load import Base, load_base
from fedgraft.moe.settings import ModelSettings

FILE = Path(__file__).with_name("lm_eval_reference.json")
METRIC = {"aggregation": "mean", "higher_is_better": True}
ARC = {
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "answer",
    "doc_to_choice": "{{choices}}",
    "metric_list": [{"metric": "acc", **METRIC}, {"metric": "acc_norm", **METRIC}],
}
MMLU = {
    "description": "The following are multiple choice questions (with answers) about high school biology.\n\n",
    "doc_to_text": "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:",
    "doc_to_target": "answer",
    "doc_to_choice": ["A", "B", "C", "D"],
    "metric_list": [{"metric": "acc", **METRIC}],
}
KINDS = {"arc": ARC, "mmlu": MMLU}


def rows(kind: str, count: int = 12) -> list[dict[str, Any]]:
    """Shipped rows, with a subject where they are to be asked as MMLU."""
    shipped = [row for _, row in read_rows(SHIPPED / "arc_easy_sample.jsonl.gz")][:count]
    return [{**row, "subject": "high_school_biology"} for row in shipped] if kind == "mmlu" else shipped


def write(folder: Path, kind: str) -> tuple[Path, Path]:
    """(rows as JSON lines, lm-eval's task over them)."""
    data, task = folder / f"{kind}.jsonl", folder / f"{kind}.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(kind)), encoding="utf-8")
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    task.write_text(yaml.safe_dump({"task": kind, **source, "output_type": "multiple_choice", **KINDS[kind]}), encoding="utf-8")
    return data, task


def answers(base: Base, task: Path, batch_size: int = 4) -> tuple[list[list[float]], dict[str, float]]:
    """(log-likelihoods per row and option, metrics) by lm-eval."""
    results = harness.evaluate(harness.live_model(base, batch_size, "fp32"), [str(task)], samples=True)
    samples: Sequence[dict[str, Any]] = sorted(results["samples"][task.stem], key=lambda sample: sample["doc_id"])
    metrics = {
        key.removesuffix(",none"): value for key, value in results["results"][task.stem].items() if key in {"acc,none", "acc_norm,none"}
    }
    return [[float(likelihood) for likelihood, _ in sample["filtered_resps"]] for sample in samples], metrics


def main() -> None:
    """Write the file."""
    import tempfile

    base, found = load_base(ModelSettings()), {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            likelihoods, metrics = answers(base, write(Path(folder), kind)[1])
            found[kind] = {"likelihoods": [[round(value, 4) for value in row] for row in likelihoods], "metrics": metrics}
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

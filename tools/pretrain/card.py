"""Write the model card of the embedded base beside its weights, from the log of `train.py` and the shipped files themselves.

python tools/pretrain/card.py --log OUT/log.jsonl --model src/fedgraft/assets/base --command "..."
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from safetensors import safe_open

TEMPLATE = Path(__file__).with_name("card_template.md")


def curve(records: list[dict[str, object]], rows: int = 10) -> str:
    """A Markdown table of about `rows` evaluations and the final perplexities."""
    sources = list(records[-1]["held_out"])  # type: ignore[call-overload]
    every = max(1, len(records) // rows)
    picked = [*records[every - 1 : -1 : every], records[-1]]
    lines = ["| tokens (M) | " + " | ".join(sources) + " |", "|---" * (len(sources) + 1) + "|"]
    for record in picked:
        lines.append(f"| {record['tokens'] / 1e6:.1f} | " + " | ".join(f"{record['held_out'][s]:.2f}" for s in sources) + " |")  # type: ignore
    last = records[-1]["held_out"]
    lines.append("| perplexity | " + " | ".join(f"{math.exp(last[s]):.0f}" for s in sources) + " |")  # type: ignore[index]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--command", required=True, help="the command of train.py that made the weights")
    parser.add_argument("--note", default="", help="what a reader must know besides the command")
    options = parser.parse_args()
    by_step = {
        record["step"]: record for record in map(json.loads, options.log.read_text().splitlines())
    }  # a resumed step replaces the older one
    records = [by_step[step] for step in sorted(by_step)]
    config = json.loads((options.model / "config.json").read_text())
    weights = options.model / "model.safetensors"
    with safe_open(weights, "pt") as content:
        parameters = sum(math.prod(content.get_slice(name).get_shape()) for name in content.keys())  # noqa: SIM118
    least, most = records[-1]["expert_share"]
    text = TEMPLATE.read_text().format(
        **config,
        parameters=parameters,
        size=weights.stat().st_size / 1e6,
        tokens=records[-1]["tokens"],
        steps=records[-1]["step"],
        command=options.command,
        note=options.note,
        curve=curve(records),
        least=least,
        most=most,
        revived=sum(record.get("revived", 0) for record in records),
        uniform=1 / config["num_experts"],
    )
    (options.model / "README.md").write_text(text)


if __name__ == "__main__":
    main()

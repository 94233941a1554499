"""A fresh process that loads exported folders as their tools do and saves logits and greedy tokens: reload.py JOBS.json.

A job: {kind, folder, base, ids, out}.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def load(kind: str, folder: str, base: str) -> Any:
    """The model that the folder is."""
    if kind == "fedgraft":
        import fedgraft

        return fedgraft.load(folder).model
    from transformers import AutoModelForCausalLM

    if kind == "peft":
        from peft import PeftModel

        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=kind == "custom")


def main() -> None:
    """Every job in turn."""
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        ids = load_file(job["ids"])["ids"]
        with warnings.catch_warnings(record=True) as heard, torch.no_grad():
            model = load(job["kind"], job["folder"], job["base"])
            logits = model(input_ids=ids).logits
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        written = model.generate(input_ids=ids[:1], attention_mask=torch.ones_like(ids[:1]), **options)
        save_file(
            {"logits": logits.contiguous(), "written": written},
            job["out"],
            {"class": type(model).__name__, "heard": str([text for one in heard if "is deprecated" not in (text := str(one.message))])},
        )


if __name__ == "__main__":
    main()

"""TRL's `SFTTrainer`, made anew for each client and round on one PEFT model, over rows that are tokens already."""

from __future__ import annotations

from common import Mean, collate, model, put, taken, work
from datasets import Dataset, disable_progress_bars
from marks import Marks
from run_trainer import Stepped, settings
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main() -> None:
    """All rounds."""
    disable_progress_bars()
    marks, leaves = Marks(), work().leaves()
    own = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, "router_aux_loss_coef": 0.0}
    arguments = SFTConfig(**settings(), **own)
    tokenizer = AutoTokenizer.from_pretrained(work().folder / "base")
    for number in range(work().rounds):
        mean = Mean()
        for client in work().clients:
            put(leaves)
            trainer = SFTTrainer(
                model=model(),
                args=arguments,
                train_dataset=Dataset.from_list([row for step in work().rows[client][number] for row in step]),
                data_collator=collate,
                processing_class=tokenizer,
                callbacks=[Stepped(marks)],
            )
            marks.trained(client, number, trainer.train().training_loss)
            mean.add(client, taken())
        leaves = mean.result()
        marks.round_done()


if __name__ == "__main__":
    main()

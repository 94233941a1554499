"""transformers' `Trainer`, made anew for each client and round on one PEFT model; the adapters' mean in memory."""

from __future__ import annotations

from typing import Any

from common import Mean, collate, model, put, taken, work
from marks import Marks
from transformers import Trainer, TrainerCallback, TrainingArguments


class Stepped(TrainerCallback):
    """Notes the first step."""

    def __init__(self, marks: Marks) -> None:
        self.marks = marks

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A step is done."""
        self.marks.stepped()


def settings() -> dict[str, Any]:
    """Arguments that make it the same work: the rows in their order, a constant rate, and nothing logged, shown or saved."""
    return {
        "output_dir": str(work().folder / "trainer"),
        "per_device_train_batch_size": work().batch_size,
        "num_train_epochs": 1,
        "learning_rate": work().lr,
        "lr_scheduler_type": "constant",
        "max_grad_norm": work().clip,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }


def main() -> None:
    """All rounds."""
    marks, leaves, arguments = Marks(), work().leaves(), TrainingArguments(**settings())
    for number in range(work().rounds):
        mean = Mean()
        for client in work().clients:
            put(leaves)
            rows: Any = [row for step in work().rows[client][number] for row in step]
            trainer = Trainer(model=model(), args=arguments, train_dataset=rows, data_collator=collate, callbacks=[Stepped(marks)])
            marks.trained(client, number, trainer.train().training_loss)
            mean.add(client, taken())
        leaves = mean.result()
        marks.round_done()


if __name__ == "__main__":
    main()

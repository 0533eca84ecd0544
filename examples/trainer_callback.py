"""Prune in the middle of a Hugging Face Trainer run; the optimizer keeps its state and goes on."""

from transformers import Trainer, TrainerCallback, TrainingArguments

import chanprune_ext as cpx


class Prune(TrainerCallback):
    """Removes channels of the model before the given step, logits and loss keep their shape."""

    def __init__(self, example: dict, step: int, **options) -> None:
        self.example, self.step, self.options = example, step, options

    # In one process: in several, DistributedDataParallel holds the old shapes; prune before that.
    def on_step_begin(self, args, state, control, model=None, optimizer=None, **_):
        if state.global_step == self.step:
            example = {name: t.to(model.device) for name, t in self.example.items()}
            plain = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
            cpx.prune(model, example, inplace=True, optimizer=plain, **self.options)


def main(model, dataset, example: dict, folder: str, steps: int = 8):
    """Fine-tunes ``model``, pruned half way; the narrow model and its plan go into ``folder``."""
    options = {"ratio": 0.5, "kinds": ("mlp", "heads"), "outputs": lambda out: out.logits}
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=4, report_to=[], save_strategy="no"
    )
    prune = Prune(example, step=steps // 2, **options)
    trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=[prune])
    trainer.train()
    cpx.save(model, f"{folder}/small.safetensors")
    return trainer

"""Plans and surgery of large language models: python -m benchmarks.large_models [--out FILE].

Each case runs in a process of its own, on models of the published shapes. ``plan`` analyses a model
on the meta device, where no weights are needed, with all kinds of groups and random scores.
``apply`` narrows a model with weights in bfloat16 in place (a quarter of heads and MLP channels),
as many layers of it as memory allows. Memory is the largest resident set while that runs beyond
what was there before: for ``apply`` beyond the whole model.

Needs transformers: pip install -e '.[coverage]' --no-build-isolation.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from pathlib import Path
from typing import Any

import torch

import chanprune_ext as cpx
from chanprune_ext.report import environment

# vocabulary, hidden size, intermediate size, layers, heads, key-value heads
SHAPES = {
    "Llama-2-7B": (32_000, 4096, 11_008, 32, 32, 32),
    "Llama-3-8B": (128_256, 4096, 14_336, 32, 32, 8),
    "Llama-3-70B": (128_256, 8192, 28_672, 80, 64, 8),
}


def llama(name: str, layers: int | None = None) -> torch.nn.Module:
    """A model of that shape without weights, in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary, hidden, intermediate, depth, heads, key_value_heads = SHAPES[name]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        use_cache=False,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def with_weights(model: torch.nn.Module) -> torch.nn.Module:
    """The same model with memory behind its tensors, all of it touched."""
    config: Any = model.config
    model = model.to_empty(device="cpu")
    rotary: Any = model.get_submodule("model.rotary_emb")
    rotary.__init__(config)  # its buffer is no weight
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    return model


def tokens(device: str) -> dict[str, torch.Tensor]:
    """A short text."""
    return {"input_ids": torch.zeros(1, 8, dtype=torch.long, device=device)}


def peak() -> int:
    """The largest resident set so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(what: str, name: str, layers: int | None) -> dict[str, Any]:
    """One case."""
    torch.set_num_threads(1)
    model = llama(name, layers)
    options: dict[str, Any] = {"outputs": lambda out: out.logits, "criterion": "random"}
    if what == "apply":
        model = with_weights(model)
        options["kinds"] = ("heads", "mlp")
    found = {"what": what, "model": name, "layers": len(list(model.model.layers))}
    found["params"] = sum(p.numel() for p in model.parameters())
    example = tokens("cpu" if what == "apply" else "meta")
    if what == "apply":
        plan = cpx.plan(model, example, 0.25, **options)
    before, start = peak(), time.process_time()
    if what == "apply":
        plan.apply(model, inplace=True)
    else:
        plan = cpx.plan(model, example, 0.25, **options)
    return {
        **found,
        "cpu_seconds": round(time.process_time() - start, 2),
        "memory_bytes": peak() - before,
        "params_left": plan.params_after / plan.params_before,
    }


def main() -> None:
    """Runs all cases, each in its own process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where the results go, as JSON")
    parser.add_argument("--layers", type=int, default=12, help="of the 8B model to apply a plan to")
    arguments = parser.parse_args()
    cases = [("plan", name, None) for name in SHAPES] + [("apply", "Llama-3-8B", arguments.layers)]
    results = []
    for case in cases:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results.append(pool.apply(measured, case))
        print(json.dumps(results[-1]), flush=True)
    if arguments.out is not None:
        document = {
            "command": "python -m benchmarks.large_models --out FILE",
            "environment": dict(environment()),
            "results": results,
        }
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()

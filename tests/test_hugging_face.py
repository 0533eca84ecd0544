"""Pruned transformers models as plain folders: configurations found, or refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import chanprune_ext as cpx
from chanprune_ext.errors import ExportError, InvalidArgumentError, OutputError
from chanprune_ext.hugging_face import narrow_config, save_pretrained

if TYPE_CHECKING:
    from pathlib import Path

transformers = pytest.importorskip("transformers")

TOKENS = {"input_ids": torch.arange(24).reshape(2, 12)}


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def pruned(**options: object) -> nn.Module:
    model = llama()
    model.config.use_cache = False
    return cpx.prune(model, TOKENS, 0.5, outputs=lambda out: out.logits, **options)


def test_a_narrow_llama_is_a_plain_folder(tmp_path: Path) -> None:
    small = pruned(kinds=("heads", "mlp", "residual"))
    save_pretrained(small, tmp_path / "small", TOKENS)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert again.config.intermediate_size == 80
    assert again.config.num_attention_heads == 2
    assert again.config.num_key_value_heads == 1
    assert again.config.hidden_size == 32
    assert again.config.head_dim == 16
    with torch.no_grad():
        assert torch.equal(again(**TOKENS).logits, small(**TOKENS).logits)


def test_wrappers_are_looked_through(tmp_path: Path) -> None:
    small = pruned(kinds=("mlp",))
    for i, wrapped in enumerate((torch.compile(small), nn.DataParallel(small))):
        assert narrow_config(wrapped).intermediate_size == 80
        save_pretrained(wrapped, tmp_path / str(i), TOKENS)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(i)).eval()
        with torch.no_grad():
            assert torch.equal(again(**TOKENS).logits, small(**TOKENS).logits)


def test_layers_of_different_widths_have_no_configuration() -> None:
    small = pruned(ratios={"model.layers.0.mlp.*": 0.25}, kinds=("mlp",))
    with pytest.raises(ExportError, match=r"tensors such as 'model\.layers\.\d\.mlp.*differ"):
        narrow_config(small)


def test_a_scale_of_the_old_width_is_noticed(tmp_path: Path) -> None:
    small = pruned(kinds=("head_dim",))
    with pytest.raises(ExportError, match="computes something else"):
        save_pretrained(small, tmp_path / "small", TOKENS)
    assert not list(tmp_path.iterdir())


def test_what_is_no_pruned_transformers_model(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="must be a transformers model"):
        narrow_config(nn.Linear(3, 3))
    with pytest.raises(InvalidArgumentError, match="was not pruned"):
        narrow_config(llama())
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="can't be written"):
        save_pretrained(pruned(kinds=("mlp",)), tmp_path / "file" / "a", TOKENS)

"""Pruned transformers models as plain folders: configurations found, or refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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


def read_back(
    small: nn.Module, folder: Path, inputs: dict[str, Any], kind: str = "AutoModelForCausalLM"
) -> Any:
    """What ``from_pretrained`` makes of the folder, which computes the same."""
    save_pretrained(small, folder, inputs)
    again = getattr(transformers, kind).from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, small(**inputs).logits)
    return again


def test_a_narrow_llama_is_a_plain_folder(tmp_path: Path) -> None:
    small = pruned(kinds=("heads", "mlp", "residual"))
    again = read_back(small, tmp_path / "small", TOKENS)
    assert again.config.intermediate_size == 80
    assert again.config.num_attention_heads == 2
    assert again.config.num_key_value_heads == 1
    assert again.config.hidden_size == 32
    assert again.config.head_dim == 16


def causal(config: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.config.use_cache = False
    return model


SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize("kinds", [("heads", "mlp"), ("residual",)])
def test_the_width_of_a_head_is_written_down_where_it_was_implied(
    kinds: tuple[str, ...], tmp_path: Path
) -> None:
    config = transformers.Qwen2Config(**SIZES, intermediate_size=160, num_key_value_heads=2)
    assert getattr(config, "head_dim", None) is None
    small = cpx.prune(causal(config), TOKENS, 0.5, kinds=kinds, outputs=lambda out: out.logits)
    again = read_back(small, tmp_path, TOKENS)
    assert again.config.head_dim == 16


def test_what_a_configuration_leaves_open_is_filled_in(tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=16, bos_token_id=1
    )
    assert config.n_inner is None
    small = cpx.prune(causal(config), TOKENS, 0.5, kinds=("mlp",), outputs=lambda out: out.logits)
    again = read_back(small, tmp_path, TOKENS)
    assert again.config.n_inner == 128


def test_a_language_model_that_sees(tmp_path: Path) -> None:
    text = transformers.LlamaConfig(
        **SIZES, intermediate_size=160, num_key_value_heads=2, pad_token_id=0
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_id=95)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = torch.arange(12)[None].repeat(2, 1)
    ids[:, 3:7] = 95
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16), "use_cache": False}
    with pytest.warns(UserWarning, match="reads values"):
        small = cpx.prune(
            model,
            inputs,
            0.5,
            kinds=("heads", "mlp"),
            ignore=["*vision*", "*projector*"],
            outputs=lambda out: out.logits,
        )
    again = read_back(small, tmp_path, inputs, "LlavaForConditionalGeneration")
    found = again.config.text_config
    assert (found.intermediate_size, found.num_attention_heads, found.head_dim) == (80, 2, 16)


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

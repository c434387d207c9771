"""Models of transformers packed as modules and from the folders that they save: the same batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sne_fast import pack

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40,
}  # fmt: skip


def gpt2() -> Any:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=8, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


def bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, max_position_embeddings=8))


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=1))


def t5() -> Any:
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=40)
    return transformers.T5ForConditionalGeneration(config)


def resnet() -> Any:
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 2])
    return transformers.ResNetForImageClassification(config)


FIRST_AND_LAST = {
    gpt2: ("transformer.wte.weight", "transformer.ln_f.bias"),
    bert: ("bert.embeddings.word_embeddings.weight", "cls.predictions.transform.LayerNorm.bias"),
    llama: ("model.embed_tokens.weight", "lm_head.weight"),
    t5: ("shared.weight", "decoder.final_layer_norm.weight"),
    resnet: ("resnet.embedder.embedder.convolution.weight", "classifier.1.bias"),
}


@pytest.mark.slow
@pytest.mark.parametrize("make", FIRST_AND_LAST, ids=lambda make: make.__name__)
def test_a_module_and_its_saved_folder_give_the_same_batch(make: Callable[[], Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path / "saved")
    torch.save(model.state_dict(), tmp_path / "saved.pt")
    want = pack([model], kinds="names")
    first, last = FIRST_AND_LAST[make]
    assert (want.names[0][1][0], want.names[0][1][-1]) == (first, last)
    for source in (tmp_path / "saved", tmp_path / "saved.pt", model.state_dict()):
        batch = pack([source])
        assert batch.names[0][1] == want.names[0][1] and batch.shapes == want.shapes
        for field in ("values", "chunk_ptr", "layer_ptr", "tensor_type", "layer_level", "tensor_scale"):
            assert torch.equal(getattr(batch, field), getattr(want, field)), field
    assert torch.equal(pack([model]).tensor_type, want.tensor_type)  # classes say here what names say

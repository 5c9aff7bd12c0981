"""Families of models: what is streamed, fitted and attached is what transformers computes."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from conftest import make_tokenizer
from eora import architectures, covariance, streaming

SEQLEN = 24
WINDOW = 8  # of sliding layers: shorter than the samples
RANK = 8

# Widths of all families, by the names that most configs have for them.
SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Family -> (model type, what its config has beside the sizes).
FAMILIES = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-sliding": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {}),
    "gemma3": ("gemma3_text", {"sliding_window": WINDOW, "sliding_window_pattern": 2}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "smollm": ("llama", {"tie_word_embeddings": True}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "gpt2": ("gpt2", {}),
    "qwen3-moe": ("qwen3_moe", {"num_experts": 4, **ROUTED}),
    "qwen2-moe": (
        "qwen2_moe",
        {"num_experts": 4, "shared_expert_intermediate_size": 64, **ROUTED},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def make(folder, kind, changes):
    """Save a tiny random model of a model type, with biases that are not zero."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **changes, dtype="float32")
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith(".bias"):
                tensor.normal_(0, 0.1)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Family -> folder of its tiny model, made once."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = make(tmp_path_factory.mktemp(family), *FAMILIES[family])
        return made[family]

    return folder


@pytest.fixture(scope="module")
def samples():
    """Five right-padded samples: input_ids (5, 24) and their lengths."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([24, 20, 7, 1, 24], dtype=torch.int32)
    ids = torch.randint(2, 256, (5, SEQLEN), generator=generator, dtype=torch.int32)
    return ids.masked_fill(torch.arange(SEQLEN) >= lengths[:, None], 0), lengths


def collect(folder, samples, batch_size=3, minimum=1):
    """Streamed second moments: full layer name -> C, and tokens; and the experts made up for."""
    stream = streaming.BlockStream(folder, "cpu", torch.float32)
    found, tokens, few = {}, {}, {}

    def keep(index, block):
        moe = architectures.experts(stream.blocks[index])
        made_up = covariance.fill_experts(block, moe, minimum)
        few.update({f"{stream.name(index)}.{name}": n for name, n in made_up.items()})
        for name, leader in block.shared.items():
            found[f"{stream.name(index)}.{name}"] = block.moments[leader].mean()
            tokens[f"{stream.name(index)}.{name}"] = block.moments[leader].tokens

    data = covariance.batches(*samples, batch_size)
    covariance.run_shard(stream, range(len(stream)), data, None, keep)
    return found, tokens, few


def reference(folder, samples):
    """Layer -> its inputs (tokens, in) float64, by hooks on the whole model, sample by sample.

    Those of fused experts are worked out from what the model hands them: hidden states, the chosen
    experts and their weights, by which they are multiplied.
    """
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    )
    prefix, _ = architectures.decoder_blocks(model)
    seen = {}

    def add(name, x):
        seen.setdefault(name, []).append(x.flatten(0, -2))

    def linear(name):
        return lambda module, args: add(name, args[0])

    def fused(name):
        def hook(module, args):
            x, chosen, weights = args
            for i, (gate_up, down) in enumerate(
                zip(module.gate_up_proj, module.down_proj, strict=True)
            ):
                tokens, place = torch.where(chosen == i)
                scale = weights[tokens, place][:, None]
                gate, up = (x[tokens] @ gate_up.T).chunk(2, -1)
                add(f"{name}.{i}.gate_proj", x[tokens] * scale)
                add(f"{name}.{i}.up_proj", x[tokens] * scale)
                add(f"{name}.{i}.down_proj", module.act_fn(gate) * up * scale)

        return hook

    for name, module in model.named_modules():
        if not name.startswith(f"{prefix}."):
            continue
        if isinstance(module, nn.Linear | Conv1D) and not name.endswith("shared_expert_gate"):
            module.register_forward_pre_hook(linear(name))
        if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
            module.register_forward_pre_hook(fused(name))
    with torch.inference_mode():
        for ids, length in zip(*samples, strict=True):
            model(ids[None, :length].long())
    return {name: torch.cat(parts) for name, parts in seen.items()}


def worst(found, expected):
    """Largest relative difference of two mappings to tensors of the same names."""
    assert found.keys() == expected.keys()
    return max(
        ((found[n].double() - expected[n]).norm() / expected[n].norm()).item() for n in expected
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_second_moments_are_those_of_the_whole_model(folders, samples, family):
    found, tokens, few = collect(folders(family), samples)
    rows = reference(folders(family), samples)
    assert not few
    assert tokens == {name: len(x) for name, x in rows.items()}
    assert worst(found, {name: x.T @ x / len(x) for name, x in rows.items()}) < 1e-5

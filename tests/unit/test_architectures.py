"""Families of models: what is streamed, fitted and attached is what transformers computes."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from conftest import ROOT, make_tokenizer, symmetric
from eora import (
    adapters,
    architectures,
    autoround,
    block_files,
    covariance,
    decomposition,
    evaluation,
    factor_files,
    layers,
    loading,
    lowrank,
    oneshot,
    packing,
    rounding,
    smoothing,
    sources,
    streaming,
)
from eora import config as cfg
from eora.errors import Mistake

SEQLEN = 24
WINDOW = 8  # of sliding layers: shorter than the samples
RANK = 8

# Rounded to nearest.
SETTINGS = {
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "iters": 0,
    "batch_size": 2,
    "format": "auto_round",
    "alg_ext": False,
    "keep": [],
    "seed": 42,
    "device": "cpu",
}

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
    config = AutoConfig.for_model(kind, **SIZES | changes, dtype="float32")
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
            found[f"{stream.name(index)}.{name}"] = symmetric(block.moments[leader].mean())
            tokens[f"{stream.name(index)}.{name}"] = block.moments[leader].tokens

    data = covariance.batches(*samples, batch_size)
    covariance.run_shard(stream, range(len(stream)), data, None, folder, keep)
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
            for i, (gate_up, _) in enumerate(
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


@pytest.mark.parametrize("family", ["qwen3-moe", "qwen2-moe"])
def test_batches_do_not_matter_to_experts(folders, samples, family):
    one, tokens, _ = collect(folders(family), samples, batch_size=1, minimum=40)
    all_, counted, _ = collect(folders(family), samples, batch_size=5, minimum=40)
    assert tokens == counted
    assert worst(all_, {name: c.double() for name, c in one.items()}) < 1e-5


def test_experts_compute_what_transformers_fused_ones_do():
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_moe", **SIZES, num_experts=4, **ROUTED)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    fused = model.model.layers[0].mlp.experts
    x = torch.randn(10, 32)
    chosen = torch.rand(10, 3).topk(2).indices  # nobody takes the last expert
    weights = torch.rand(10, 2)
    split = architectures.Experts(fused)
    with torch.inference_mode():
        expected = fused(x, chosen, weights)
        torch.testing.assert_close(split(x, chosen, weights), expected, rtol=1e-6, atol=1e-6)
        split.real = torch.arange(10) < 7
        padded = split(x, chosen, weights)
    torch.testing.assert_close(padded[:7], expected[:7], rtol=1e-6, atol=1e-6)
    assert not padded[7:].any()


def test_an_expert_that_saw_few_tokens_is_filled_up_with_average_ones(folders, samples):
    minimum = 40
    own, counts, none = collect(folders("mixtral"), samples)
    filled, divisors, few = collect(folders("mixtral"), samples, minimum=minimum)
    assert not none and len(few) not in (0, 12)  # some experts have enough, some have not
    for name, c in own.items():
        expert, _, leaf = name.rpartition(".")
        if expert not in few:
            assert torch.equal(filled[name], c)
            continue
        beside = [f"{expert.rpartition('.')[0]}.{i}.{leaf}" for i in range(4)]
        total = sum(own[n].double() * counts[n] for n in beside)
        average = total / sum(counts[n] for n in beside)
        expected = (c.double() * counts[name] + average * (minimum - counts[name])) / minimum
        torch.testing.assert_close(filled[name].double(), expected, rtol=1e-5, atol=1e-7)
        assert few[expert] == counts[name] and divisors[name] == minimum


def test_an_expert_that_saw_no_token_takes_the_average(folders, samples):
    stream = streaming.BlockStream(folders("mixtral"), "cpu", torch.float32)
    moe = architectures.experts(stream.blocks[0])
    block = covariance.BlockMoments()
    for i in (0, 2):
        for leaf, width in (("gate_proj", 32), ("down_proj", 64)):
            moment = block.moments[f"mlp.experts.{i}.{leaf}"] = covariance.SecondMoment()
            moment.add(torch.full((1 + i, width), float(1 + i)))
    few = covariance.fill_experts(block, moe, 1)
    assert few == {"mlp.experts.1": 0, "mlp.experts.3": 0}
    assert block.shared["mlp.experts.3.up_proj"] == "mlp.experts.3.gate_proj"
    average = symmetric(block.moments["mlp.experts.3.gate_proj"].mean())
    torch.testing.assert_close(average, torch.full((32, 32), (1 + 3 * 9) / 4))


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral"])
def test_fused_and_separate_experts_in_the_files_are_the_same(folders, family, tmp_path):
    """Experts as transformers holds them, and as the hub's first checkpoints name them."""
    model = AutoModelForCausalLM.from_pretrained(folders(family))
    model.config.save_pretrained(tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    separate = streaming.BlockStream(folders(family), "cpu")
    fused = streaming.BlockStream(tmp_path, "cpu")
    names = {name.replace("block_sparse_moe", "mlp") for name in separate._files}
    assert names != set(fused._files)
    with separate.block(1) as one, fused.block(1) as other:
        tensors = dict(other.named_parameters())
        assert tensors.keys() == dict(one.named_parameters()).keys()
        for name, tensor in one.named_parameters():
            assert torch.equal(tensor, tensors[name])


def test_a_checkpoint_without_the_base_models_prefix(folders, tmp_path):
    """As the hub's GPT-2: h.0.attn.c_attn.weight."""
    model = AutoModelForCausalLM.from_pretrained(folders("gpt2"))
    model.config.save_pretrained(tmp_path)
    save_file(model.transformer.state_dict(), tmp_path / "model.safetensors")
    stream = streaming.BlockStream(tmp_path, "cpu")
    ids = torch.arange(2, 12)[None]
    with torch.inference_mode(), stream.block(0) as block:
        states = model(ids, output_hidden_states=True).hidden_states
        torch.testing.assert_close(block(stream.embed(ids), **stream.calls(1, 10)[0]), states[1])


def rounded(folder, out):
    """Save a copy whose blocks' matrices, but for routers and gates, are rounded coarsely."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    prefix, _ = architectures.decoder_blocks(model)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.startswith(prefix) and tensor.ndim > 1 and "gate.weight" not in name:
                tensor.copy_((tensor * 16).round() / 16)
    model.save_pretrained(out)
    return out


def fit(original, compressed, samples, out):
    """Second moments, factors and adapters of a model's blocks; adapters in out/r16 and out/r4."""
    streams = [streaming.BlockStream(folder, "cpu") for folder in (original, compressed)]

    def keep(index, block):
        covariance.fill_experts(block, architectures.experts(streams[0].blocks[index]), 8)
        covariance.save_moments(out / block_files.name(index), block)

    blocks = range(len(streams[0]))
    data = covariance.batches(*samples, 5)
    covariance.run_shard(streams[0], blocks, data, None, out, keep)
    factors = out / "factors"
    factors.mkdir()
    plain = smoothing.Smoothing(out)
    for index in blocks:
        decomposition.decompose_block(*streams, index, out, factors, 99, "eora", plain)
    files = block_files.listed(factors)
    pairs, curves = factor_files.slice_rank(files, RANK)
    assert all(curve[RANK] < 0.8 * curve[0] for curve in curves.values())
    transposed = factor_files.is_transposed(files)
    adapters.save_peft(out / "r16", pairs, "tiny", transposed)
    factor_files.save_moments(out / "moments", files, RANK)
    moments = factor_files.InputMoments(out / "moments")
    low = ((name, *rounding.refit(*pairs[name], *moments.of(name), 4, 32)) for name in pairs)
    packing.save(out / "r4", low, 4, 32, "tiny", transposed)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decomposition_put_into_the_weights_or_beside_them(folders, samples, family, tmp_path):
    original, compressed = folders(family), rounded(folders(family), tmp_path / "rounded")
    fit(original, compressed, samples, tmp_path)

    def load(folder):
        model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
        architectures.split_experts(model)
        return model

    ids = samples[0][:1].long()
    merged, beside = load(compressed), lowrank.attach(load(compressed), tmp_path / "r16")
    with torch.inference_mode():
        before = merged(ids).logits
        for name, (a, b) in adapters.load_peft(tmp_path / "r16").items():
            architectures.dense_weight(merged.get_submodule(name)).add_(b.float() @ a.float())
        torch.testing.assert_close(beside(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)
        exact = load(original)(ids).logits
        assert (beside(ids).logits - exact).norm() < 0.7 * (before - exact).norm()


def test_peft_takes_the_adapter_of_transposed_layers(folders, samples, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders("gpt2"))
    torch.manual_seed(0)
    pairs = {
        name: (torch.randn(RANK, module.weight.shape[0]), torch.randn(module.nf, RANK) * 0.1)
        for name, module in model.named_modules()
        if isinstance(module, Conv1D)
    }
    adapters.save_peft(tmp_path, pairs, "tiny", transposed=True)
    assert adapters.is_transposed(tmp_path)
    ids = samples[0][:1].long()
    with torch.inference_mode():
        before = model(ids).logits
        ours = lowrank.attach(model, tmp_path)(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(folders("gpt2"))
        theirs = PeftModel.from_pretrained(plain, tmp_path)
        torch.testing.assert_close(ours, theirs(ids).logits, rtol=1e-4, atol=1e-4)
        merged = theirs.merge_and_unload()  # the weights are transposed here
        torch.testing.assert_close(ours, merged(ids).logits, rtol=1e-3, atol=1e-3)
        plain = AutoModelForCausalLM.from_pretrained(folders("gpt2"))
        loading.merge(plain, tmp_path).save_pretrained(tmp_path / "merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(ours, again(ids).logits, rtol=1e-3, atol=1e-3)
    assert (ours - before).abs().max() > 0.1


def test_merging_takes_factors_as_they_are_stored(folders, tmp_path):
    """They have 11 bits of precision; a model in bfloat16 8, to which the sum alone is rounded."""
    torch.manual_seed(0)
    name = "model.layers.0.mlp.up_proj"
    pair = torch.randn(RANK, 32), torch.randn(64, RANK)
    adapters.save_peft(tmp_path, {name: pair}, "tiny")
    model = AutoModelForCausalLM.from_pretrained(folders("llama"), dtype=torch.bfloat16)
    before = model.get_submodule(name).weight.detach().clone()
    a, b = (factor.half().float() for factor in pair)
    after = loading.merge(model, tmp_path).get_submodule(name).weight
    assert torch.equal(after, (before.float() + b @ a).bfloat16())


def test_fused_experts_are_not_merged(folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders("mixtral"))
    architectures.split_experts(model)
    name = "model.layers.0.mlp.experts.0.up_proj"
    out, inner = architectures.dense_weight(model.get_submodule(name)).shape
    adapters.save_peft(tmp_path, {name: (torch.ones(RANK, inner), torch.ones(out, RANK))}, "")
    with pytest.raises(Mistake, match=r"experts\.0\.up_proj is a part of fused experts"):
        loading.merge(model, tmp_path)


@pytest.mark.parametrize("kind", ["diffllama", "bitnet"])
def test_awq_that_makes_another_model_of_it_is_refused(samples, kind, tmp_path):
    """Norms stand between values and output layer, where llm-compressor takes Llama's names."""
    folder = make(tmp_path / kind, kind, {"num_key_value_heads": 4})
    rounding = {"bits": 3, "group_size": 32}
    with pytest.raises(Mistake, match="awq does not fit .* before any rounding, its logits are"):
        oneshot.compress(folder, tmp_path / "out", samples[0], method="awq", keep=[], **rounding)


# --- what is refused, and where ---

# Model type -> what the message says of a config.json such as transformers writes.
KINDS = {
    "bart": "is an encoder-decoder",
    "gemma3": "is a model of images or sound beside text",
    "mamba": "is a state-space model",
    "jamba": "is a state-space model, or a hybrid with one",
    "lfm2": "is a state-space model, or a hybrid with one",
    "qwen3_next": "is a hybrid with layers of linear_attention",
    "gemma3n_text": "is a model with embeddings for each layer",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_refused_by_config_json_alone(kind, tmp_path):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    config = {
        "models": {"m": {"path": str(tmp_path)}},
        "tasks": {"t": {"lm_eval": "arc_easy"}},
    }
    schema = cfg.load_schema(ROOT / "workflow/schemas/config.schema.yaml")
    with pytest.raises(cfg.ConfigError) as caught:
        cfg.validate(config, schema)
    expected = f"- models.m.path: model_type {kind} {KINDS[kind]}"
    assert str(caught.value).startswith(expected)
    assert str(caught.value).endswith("which is not supported; name another model")
    with pytest.raises(Mistake, match=KINDS[kind]):
        sources.check_kind(tmp_path)


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in FAMILIES.values()}))
def test_a_supported_kind_passes(kind):
    assert sources.unsupported_kind(AutoConfig.for_model(kind).to_dict()) is None


SMALL_STATES = {"state_size": 4, "conv_kernel": 2}
# Model type -> what its config has beside the sizes, and what the message says of its modules.
MODULES = {
    "mamba": (SMALL_STATES, r"block 0 holds mixer\.(A_log|conv1d\.weight) of shape"),
    "bert": ({}, "its tokens see those after them, as in an encoder"),
    "bart": ({"decoder_layers": 2}, "no list of 3 decoder blocks is found in it"),
    "gpt_oss": ({"num_local_experts": 4}, r"mlp\.experts\.gate_up_proj holds experts of an unk"),
    "gptj": ({"rotary_dim": 4}, "block 1 does not take the hidden states as block 0 returns them"),
    "xlstm": ({"num_heads": 4}, "its blocks return more than hidden states"),
}


@pytest.mark.parametrize("kind", MODULES)
def test_an_architecture_is_refused_by_its_modules(kind, tmp_path):
    changes, message = MODULES[kind]
    make(tmp_path, kind, changes)
    with pytest.raises(Mistake, match=message) as caught:
        streaming.check(tmp_path)
    assert f"({kind}) is not supported: " in str(caught.value)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_what_wants_plain_layers_refuses_others(folders, family):
    layers.check_plain(streaming.check(folders("llama")), "a.around")
    with pytest.raises(Mistake, match=r"a\.around and b\.tune: for plain linear layers"):
        layers.check_plain(streaming.check(folders(family)), "a.around", "b.tune")


def test_blocks_that_share_what_they_fill_in_are_refused(folders):
    model = AutoModelForCausalLM.from_pretrained(folders("llama"))
    recorders = [architectures.Recorder(block) for block in model.model.layers]
    hidden = torch.zeros(1, 2, 32)
    for recorder in recorders:
        recorder.hidden = hidden
    architectures.check_calls(model, recorders)
    recorders[2].kwargs = {"states": {}}
    with pytest.raises(Mistake, match=r"share states \(dict\) beside hidden states"):
        architectures.check_calls(model, recorders)


# --- through AutoRound and back ---


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "qwen3-moe"])
def test_quantized_decomposed_and_judged(folders, samples, family, tmp_path):
    original, compressed = folders(family), tmp_path / "model"
    ids = torch.randint(2, 256, (4, 32), generator=torch.Generator().manual_seed(2))
    autoround.quantize(original, compressed, ids, **SETTINGS)
    fit(original, compressed, samples, tmp_path)
    assert adapters.is_transposed(tmp_path / "r16") == (family == "gpt2")
    with torch.inference_mode():
        exact = loading.load(original)[0](ids).logits
        errors = [
            (loading.load(compressed, adapter)[0](ids).logits - exact).norm()
            for adapter in (None, tmp_path / "r16", tmp_path / "r4")
        ]
    assert errors[1] < 0.85 * errors[0] and errors[2] < 0.85 * errors[0]
    model, _ = loading.load(compressed, tmp_path / "r4")
    assert evaluation.perplexity(model, ids, 2).metrics["perplexity"]["value"] > 1
    # The packed layers that are streamed are those that transformers loads.
    whole, _ = loading.load(compressed)
    stream = streaming.BlockStream(compressed, "cpu")
    layers = architectures.linear_layers(streaming.BlockStream(original, "cpu").blocks[1])
    with stream.block(1) as block:
        for name in layers:
            weight = architectures.dense_weight(block.get_submodule(name))
            loaded = whole.get_submodule(f"{stream.name(1)}.{name}").weight
            # AutoRound loads in 16 bits whatever the checkpoint's dtype.
            torch.testing.assert_close(weight, loaded, rtol=1e-2, atol=1e-3, check_dtype=False)

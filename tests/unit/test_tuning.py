"""Fine-tuning, on a tiny model with a random adapter."""

import shutil

import pytest
import torch
from torch.nn import functional
from transformers import TrainerCallback

from eora import adapters, architectures, loading, streaming, tuning

RANK = 4
SETTINGS = {
    "steps": 8, "batch_size": 4, "learning_rate": 0.01, "start": "fitted", "seed": 0,
    "most": 4, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def fitted(tiny_model, tmp_path_factory):
    """A folder with a random adapter of the tiny model's decoder layers."""
    torch.manual_seed(1)
    layers = architectures.linear_layers(streaming.BlockStream(tiny_model, "cpu").model)
    pairs = {
        name: (torch.randn(RANK, layer.in_features), 0.01 * torch.randn(layer.out_features, RANK))
        for name, layer in layers.items()
        if ".layers." in name
    }
    folder = tmp_path_factory.mktemp("adapter")
    adapters.save_peft(folder, pairs, "tiny")
    return folder


def samples(count=8, seqlen=16):
    """Sentences of two alternating tokens, easy to learn; the last is cut short."""
    ids = torch.arange(seqlen).remainder(2).repeat(count, 1) + 10
    lengths = torch.full((count,), seqlen)
    lengths[-1] = 3
    return tuning.Samples(ids, lengths)


def test_padding_is_neither_seen_nor_learned():
    last = samples()[7]
    assert last["attention_mask"].tolist() == [1] * 3 + [0] * 13
    assert last["labels"].tolist() == [10, 11, 10] + [-100] * 13


@pytest.mark.parametrize("start", ["fitted", "zero"])
def test_the_loss_falls_from_that_of_the_start(tiny_model, fitted, tmp_path, start):
    """Which is the loss of the model with the adapter as it is, or without one; what comes out is
    the adapter that this loss was reached with."""
    data = samples(count=4)  # one batch
    pairs, losses = tuning.tune(
        tiny_model, fitted, data, tmp_path / "c", **SETTINGS | {"start": start}
    )
    assert [entry["step"] for entry in losses] == list(range(1, 9))
    assert losses[-1]["loss"] < 0.8 * losses[0]["loss"]
    assert losses[-1]["learning_rate"] < losses[1]["learning_rate"] <= 0.01

    def loss(adapter):
        model, _ = loading.load(tiny_model, adapter)
        found = [data[i] for i in range(len(data))]
        batch = {key: torch.stack([one[key] for one in found]) for key in found[0]}
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch).logits[:, :-1]
        return functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).item()

    assert losses[0]["loss"] == pytest.approx(loss(fitted if start == "fitted" else None), rel=1e-4)
    adapters.save_peft(tmp_path / "tuned", pairs, "tiny")
    assert loss(tmp_path / "tuned") < losses[-2]["loss"]


class Killed(Exception):
    """Stands for a kill in the middle of a step."""


def test_a_killed_run_goes_on_to_the_same_factors(tiny_model, fitted, tmp_path, monkeypatch):
    whole, losses = tuning.tune(tiny_model, fitted, samples(), tmp_path / "a", **SETTINGS)

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 5:
                raise Killed

    def dying(*args, callbacks, **kwargs):
        return trainer(*args, callbacks=[*callbacks, Kill()], **kwargs)

    trainer = tuning.Trainer
    checkpoints = tmp_path / "b"
    with monkeypatch.context() as patched:
        patched.setattr(tuning, "Trainer", dying)
        with pytest.raises(Killed):
            tuning.tune(tiny_model, fitted, samples(), checkpoints, **SETTINGS)
    cut = shutil.copytree(checkpoints / "checkpoint-4", checkpoints / "checkpoint-5")
    (cut / "whole").unlink()
    (cut / "optimizer.pt").write_bytes(b"half")
    steps = []

    class Counting(trainer):
        def training_step(self, *args, **kwargs):
            steps.append(self.state.global_step)
            return super().training_step(*args, **kwargs)

    monkeypatch.setattr(tuning, "Trainer", Counting)
    again, told = tuning.tune(tiny_model, fitted, samples(), checkpoints, **SETTINGS)
    assert steps == [4, 5, 6, 7]
    assert told == losses
    for name, pair in whole.items():
        for one, other in zip(pair, again[name], strict=True):
            assert torch.equal(one, other), name


def test_what_is_trained_on_is_the_same_whatever_runs_at_once(tiny_model, fitted, tmp_path):
    assert [tuning.at_once(8, most) for most in (1, 3, 8, 100)] == [1, 2, 8, 8]
    few, _ = tuning.tune(tiny_model, fitted, samples(), tmp_path / "a", **SETTINGS | {"most": 1})
    many, _ = tuning.tune(tiny_model, fitted, samples(), tmp_path / "b", **SETTINGS)
    for name, pair in few.items():
        torch.testing.assert_close(pair, many[name], rtol=1e-3, atol=1e-4)

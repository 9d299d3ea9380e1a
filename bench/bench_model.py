"""The model beside Hugging Face's: a pretraining step, and filling masks.

    pytest --benchmark-only bench/bench_model.py

Same weights, same batch, same dropout, and the step that people would write: theirs with the optimiser as
`torch.optim.AdamW(model.parameters())` gives it, and once with the fused one, which their Trainer takes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import measure
import numpy as np
import pytest
import torch
from measure import CLOCK, DEVICE, ON_GPU, PRECISIONS, ProcessContestant

import train
from data import IGNORED, Batch, Step, mask_tokens
from roberta import RobertaConfig, RobertaForMaskedLM

pytestmark = pytest.mark.benchmark(timer=CLOCK)

TINY = RobertaConfig.tiny(
    vocab_size=50265, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024,
    hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
)
# config, sequences, tokens of a sequence, rounds
STEPS = {
    "tiny T=128": (TINY, 64 if ON_GPU else 16, 128, 9 if ON_GPU else 3),
    "BASE T=128": (RobertaConfig.base(), 64 if ON_GPU else 4, 128, 9 if ON_GPU else 2),
    "BASE T=512": (RobertaConfig.base(), 32 if ON_GPU else 2, 512, 9 if ON_GPU else 2),
}
HUGGING_FACE = ("Hugging Face sdpa", "Hugging Face eager", "Hugging Face sdpa, fused AdamW")
if ON_GPU:
    HUGGING_FACE += ("Hugging Face compiled, fused AdamW",)
# On the CPU also without train.keep_freed_memory, to see what it gains.
STEPPERS = ("ours", "ours compiled" if ON_GPU else "ours, freed memory returned", *HUGGING_FACE)


def present(peers: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the contestants that can take part."""
    here = measure.installed("transformers", "Hugging Face's model")
    return peers if here else tuple(name for name in peers if name.startswith("ours"))


def make_batch(config: RobertaConfig, batch_size: int, seq_len: int) -> tuple[Step, np.ndarray]:
    """Returns a step of one batch of full sequences, and its labels (B, T) as Hugging Face wants them."""
    ids = np.random.default_rng(0).integers(5, config.vocab_size - 1, (batch_size, seq_len))
    ids[:, 0], ids[:, -1] = config.bos_token_id, config.eos_token_id
    masked, labels = mask_tokens(ids, np.arange(batch_size), 0, seed=0, vocab_size=config.vocab_size)
    positions = np.flatnonzero(labels != IGNORED)
    batch = Batch(masked, np.ones(masked.shape, bool), positions, labels.reshape(-1)[positions], None, None,
                  masked.size)
    return Step(0.0, [batch], len(positions), batch_size), labels


class Pretraining(train.Run):
    """train.py's own step, on one batch without a corpus behind it."""

    def loss_sums(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        return train.loss_sums(self.wrapped, batch, self.setup.device)[:1]

    def loss_counts(self, step: Step) -> list[int]:
        return [step.num_predictions]


def our_step(size: str, precision: str, name: str) -> Callable[[], None]:
    """Returns a function that does train.py's step."""
    config, batch_size, seq_len, _ = STEPS[size]
    step, _ = make_batch(config, batch_size, seq_len)
    setup = train.Setup(0, 1, DEVICE, precision)
    if not ON_GPU and "returned" not in name:
        train.keep_freed_memory()  # as set_up() does
    torch.manual_seed(0)
    batches = SimpleNamespace(num_micro_batches=1)
    run = Pretraining(train.TrainConfig(out="."), setup, RobertaForMaskedLM(config), None, batches, 10, 10**6)
    if "compiled" in name:
        run.wrapped = train.try_to_compile(run.wrapped, step.batches[0], setup)
    return lambda: run.train_step(step)


def hugging_face(config: RobertaConfig, attention: str) -> torch.nn.Module:
    """Returns Hugging Face's model with our weights."""
    import transformers

    torch.manual_seed(0)
    ours = RobertaForMaskedLM(config)
    theirs = transformers.RobertaConfig.from_dict(vars(config) | {"attn_implementation": attention})
    model = transformers.RobertaForMaskedLM(theirs)
    model.load_state_dict(ours.to_hugging_face(), strict=False)
    model.tie_weights()
    return model.to(DEVICE)


def their_step(size: str, precision: str, name: str) -> Callable[[], None]:
    """Returns a function that does a step as their users write it."""
    config, batch_size, seq_len, _ = STEPS[size]
    step, labels = make_batch(config, batch_size, seq_len)
    arrays = step.batches[0].input_ids, step.batches[0].attention_mask, labels
    model = hugging_face(config, "eager" if "eager" in name else "sdpa").train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True if "fused" in name else None)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=precision == "fp16")
    setup = train.Setup(0, 1, DEVICE, precision)
    called = torch.compile(model) if "compiled" in name else model

    def step_once() -> None:
        input_ids, attention_mask, targets = (train.to_tensor(array, DEVICE) for array in arrays)
        with setup.autocast():
            loss = called(input_ids=input_ids, attention_mask=attention_mask, labels=targets).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step_once


@pytest.mark.parametrize("who", present(STEPPERS))
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", STEPS)
def test_pretraining_step(benchmark, size, precision, who):
    """Forward, backward, optimiser."""
    config, batch_size, seq_len, rounds = STEPS[size]
    makers = {name: partial(our_step if name.startswith("ours") else their_step, size, precision, name)
              for name in present(STEPPERS)}
    case = f"pretraining step, {size}, {batch_size} sequences, {precision}"
    turns = measure.take_turns(case, makers, rounds, ProcessContestant, warmup=2 if ON_GPU else 1)
    step, _ = make_batch(config, batch_size, seq_len)
    flops = 3 * measure.model_flops(config, batch_size, seq_len, step.num_predictions)
    measure.report(benchmark, case, who, turns, flops, precision, tokens=batch_size * seq_len)


def make_filler(who: str, batch_size: int, seq_len: int) -> Callable[[], object]:
    """Returns a function that finds the five best tokens for the mask in each of a batch of texts."""
    config = RobertaConfig.base()
    input_ids = np.random.default_rng(0).integers(5, config.vocab_size - 1, (batch_size, seq_len))
    input_ids[:, 7] = config.vocab_size - 1
    input_ids = torch.from_numpy(input_ids).to(DEVICE)
    if who == "ours":
        torch.manual_seed(0)
        ours = RobertaForMaskedLM(config).to(DEVICE).eval()
        positions = torch.arange(batch_size, device=DEVICE) * seq_len + 7
        return torch.inference_mode()(lambda: ours(input_ids, positions=positions).topk(5))
    theirs = hugging_face(config, "sdpa").eval()
    return torch.inference_mode()(lambda: theirs(input_ids).logits[:, 7].topk(5))


@pytest.mark.parametrize("who", present(("ours", "Hugging Face sdpa")))
@pytest.mark.parametrize("batch_size", (1, 8, 64))
def test_fill_mask(benchmark, batch_size, who):
    """Forward only: texts of 32 tokens, one of them masked."""
    config, seq_len = RobertaConfig.base(), 32
    makers = {name: partial(make_filler, name, batch_size, seq_len)
              for name in present(("ours", "Hugging Face sdpa"))}
    case = f"fill-mask, BASE, batch of {batch_size}"
    turns = measure.take_turns(case, makers, 3, ProcessContestant, warmup=1)
    flops = measure.model_flops(config, batch_size, seq_len, batch_size)
    measure.report(benchmark, case, who, turns, flops, tokens=batch_size * seq_len, texts=batch_size)

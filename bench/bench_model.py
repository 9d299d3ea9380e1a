"""The model beside Hugging Face's: a pretraining step, and filling masks.

    pytest --benchmark-only bench/bench_model.py

Same weights, same batch, same dropout, and the step that people would write: theirs with the optimiser as
`torch.optim.AdamW(model.parameters())` gives it, and with the fused one, which their Trainer takes. Where
ours gains: it scores the vocabulary only where there is a prediction, at about 15 % of the positions, which
matters the more the smaller the model is beside its vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import measure
import numpy as np
import pytest
import torch
from measure import DEVICE, ON_GPU, PEERS, PRECISIONS, QUICK
from torch.nn import functional as F

import train
from data import BOS, EOS, NOT_PREDICTED, Batch, mask_tokens
from roberta import RobertaConfig, RobertaForMaskedLM

TINY = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
BASE = {"num_hidden_layers": 1} if QUICK else {}
# by name: what a configuration changes in BASE, sequences on a CPU and on a GPU, tokens of a sequence
STEPS = {
    "tiny T=128": (TINY, 16, 64, 128),
    "BASE T=128": (BASE, 4, 64, 128),
    "BASE T=512": (BASE, 2, 32, 512),
}


def make_model(changes: dict[str, int], directory: Path) -> RobertaForMaskedLM:
    """Returns ours at random weights, and saves it for theirs to open."""
    torch.manual_seed(0)
    model = RobertaForMaskedLM(RobertaConfig.base(**changes))
    model.save_pretrained(directory)
    return model.to(DEVICE)


def hugging_face(directory: Path, attention: str = "sdpa") -> torch.nn.Module:
    """Returns their model with the weights that ours has saved. attention: "eager" or "sdpa", torch's kernel.
    """
    import transformers

    model = transformers.RobertaForMaskedLM.from_pretrained(directory, attn_implementation=attention)
    return model.to(DEVICE)


def make_batch(vocab_size: int, batch_size: int, seq_len: int) -> tuple[Batch, np.ndarray]:
    """Returns a batch of full sequences, and its labels (B, T) as Hugging Face wants them.

    Ours has labels for the predicted places only, (M,); theirs for all, -100 where nothing is predicted.
    """
    ids = np.random.default_rng(0).integers(5, vocab_size - 1, (batch_size, seq_len))
    ids[:, 0], ids[:, -1] = BOS, EOS
    rows, epochs = np.arange(batch_size), np.zeros(batch_size, int)
    masked, labels = mask_tokens(ids, rows, epochs, seed=0, vocab_size=vocab_size)
    predicted = np.flatnonzero(labels != NOT_PREDICTED)
    everything, wanted = np.ones(masked.shape, bool), labels.reshape(-1)[predicted]
    return Batch(masked, everything, predicted, wanted, None, None, masked.size), labels


def our_step(model: RobertaForMaskedLM, batch: Batch, precision: str, compiled: bool = False) -> Callable:
    """Returns a function that does train.py's step."""
    # As `pretrain` does it, but the rate, which costs nothing, is always the same.
    config = train.TrainConfig(precision=precision, batch_size=len(batch.input_ids), compile=compiled)
    training = train.begin(config, train.set_up(config), model)
    losses, counts = functools.partial(train.loss_sums, device=DEVICE), [len(batch.labels)]

    def step() -> None:
        torch.backends.cuda.enable_cudnn_sdp(False)  # as `set_up` has it: the other contestants turn it on
        train.accumulate(training, [batch], losses, counts)
        train.update(training, 1e-4)

    return step


def their_step(directory: Path, batch: Batch, labels: np.ndarray, precision: str, attention: str = "sdpa",
               fused: bool | None = None, compiled: bool = False) -> Callable:
    """Returns a function that does a step as users of Hugging Face's model write it."""
    dtype, model = measure.DTYPES[precision], hugging_face(directory, attention)
    arrays = batch.input_ids, batch.attention_mask, labels
    # Their loss is the mean over the predicted places, ours the sum over their number: the same gradients.
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4, fused=fused)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=precision == "fp16")
    called = torch.compile(model) if compiled else model

    def step() -> None:
        torch.backends.cuda.enable_cudnn_sdp(True)  # torch's default, which train.py changes
        input_ids, attention_mask, targets = (torch.from_numpy(array).to(DEVICE) for array in arrays)
        with torch.autocast(DEVICE.type, dtype, enabled=precision != "fp32"):
            loss = called(input_ids=input_ids, attention_mask=attention_mask, labels=targets).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


# "ours" is what train.py does: compiled on a GPU. On a CPU there may be no C++ compiler.
OURS = {"ours": {"compiled": ON_GPU}} | ({"ours, not compiled": {}} if ON_GPU else {})
THEIRS = {"Hugging Face": {}, "Hugging Face, fused AdamW": {"fused": True}}
if ON_GPU:
    THEIRS |= {"Hugging Face, eager attention": {"attention": "eager"},
               "Hugging Face, fused AdamW, compiled": {"fused": True, "compiled": True}}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", STEPS)
def test_pretraining_step(benchmark, tmp_path, size, precision):
    """Forward, backward, optimiser; the batch is handed over anew in every turn."""
    torch.compiler.reset()  # a second shape in one process would be compiled for any shape
    changes, on_cpu, on_gpu, seq_len = STEPS[size]
    batch_size = 1 if QUICK else on_gpu if ON_GPU else on_cpu
    contestants = {}
    for name, options in OURS.items():
        model = make_model(changes, tmp_path)
        batch, labels = make_batch(model.config.vocab_size, batch_size, seq_len)
        contestants[name] = our_step(model, batch, precision, **options)
    for name, options in THEIRS.items() if PEERS else ():
        contestants[name] = their_step(tmp_path, batch, labels, precision, **options)
    # Theirs computes more, the scores of the vocabulary at every place; what counts is what the task needs.
    forward = measure.model_flops(model.config, batch_size, seq_len, len(batch.predicted))
    measure.compare(
        benchmark, f"pretraining step, {size}, batch of {batch_size}, {precision}", contestants,
        rounds=9 if ON_GPU else 3, warmup=3 if ON_GPU else 1, amount=(batch_size * seq_len, "tokens"),
        flops=3 * forward, precision=precision,
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_attention(benchmark, precision):
    """Forward and backward of one layer's attention, in rows that are 90 to 100 % full: as roberta.py has it,
    with a mask that shuts out padding, and without.
    """
    B, T, H, D = (2, 64, 3, 16) if QUICK else (32 if ON_GPU else 4, 512, 12, 64)
    dtype = measure.DTYPES[precision]
    qkv = [torch.randn(B, T, H, D, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(3)]
    lengths = torch.linspace(0.9 * T, T, B, device=DEVICE).long()
    real = torch.arange(T, device=DEVICE) < lengths[:, None]  # (B, T)
    # A mask keeps out torch's fastest kernel. Without one each row counts as two sequences, its real tokens
    # and its padding: so no token moves, and none sees a token of the other kind.
    ends = torch.stack([lengths, T - lengths], 1).flatten().cumsum(0)
    two_a_row = functools.partial(torch.nested.nested_tensor_from_jagged, offsets=F.pad(ends, (1, 0)),
                                  min_seqlen=1, max_seqlen=T)

    def masked(dropout: float = 0.1) -> torch.Tensor:
        q, k, v = (part.transpose(1, 2) for part in qkv)
        return F.scaled_dot_product_attention(q, k, v, real[:, None, None], dropout).transpose(1, 2)

    def jagged(dropout: float = 0.1) -> torch.Tensor:
        q, k, v = (two_a_row(part.flatten(0, 1)).transpose(1, 2) for part in qkv)
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return attended.transpose(1, 2).values().unflatten(0, (B, T))

    torch.testing.assert_close(masked(0)[real], jagged(0)[real], atol=2e-2, rtol=2e-2)
    contestants = {"ours": lambda: masked().sum().backward(), "jagged": lambda: jagged().sum().backward()}
    measure.compare(benchmark, f"attention, {B} x {T}, {precision}", contestants, rounds=9, warmup=3)


@pytest.mark.parametrize("batch_size", (1, 8) if QUICK else (1, 64))
def test_fill_mask(benchmark, tmp_path, batch_size):
    """Forward only: the five best tokens for the one mask in each of some texts of 32 tokens."""
    seq_len, place = 32, 7
    model = make_model(BASE, tmp_path).eval()
    vocab_size = model.config.vocab_size
    input_ids = np.random.default_rng(0).integers(5, vocab_size - 1, (batch_size, seq_len))
    input_ids[:, place] = vocab_size - 1  # <mask>
    input_ids = torch.from_numpy(input_ids).to(DEVICE)
    predicted = torch.arange(batch_size, device=DEVICE) * seq_len + place
    contestants = {"ours": lambda: model(input_ids, predicted=predicted).topk(5)}
    if PEERS:
        theirs = hugging_face(tmp_path).eval()
        contestants["Hugging Face"] = lambda: theirs(input_ids).logits[:, place].topk(5)
    flops = measure.model_flops(model.config, batch_size, seq_len, batch_size)
    with torch.inference_mode():
        measure.compare(benchmark, f"fill-mask, BASE, batch of {batch_size}", contestants, rounds=5,
                        amount=(batch_size, "texts"), flops=flops)

"""Trains the demo checkpoint from scratch on two CPU cores, in half an hour.

    python -m captionserve_server.demo.train --output DIR --minutes 28 --seed 1

The caption loss alone would take hours to teach the encoder where to look, so that in training a
throw-away head also names the kind, colour, role and relation of what each patch shows.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset
from transformers import GPT2Tokenizer, VisionEncoderDecoderModel

from captionserve_server.demo.batches import (
    COLOUR_CLASSES,
    IGNORED,
    KIND_CLASSES,
    RELATION_CLASSES,
    ROLE_CLASSES,
    Batch,
    batches,
)
from captionserve_server.demo.checkpoint import (
    ModelSize,
    new_model,
    save_checkpoint,
    train_tokenizer,
)

_LOGGER = logging.getLogger(__name__)
_PATCH_CLASSES = (KIND_CLASSES, COLOUR_CLASSES, ROLE_CLASSES, RELATION_CLASSES)
_WARMUP_SHARE = 0.04
_LOG_EVERY_STEPS = 50
_SAVE_EVERY_STEPS = 200
_MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class TrainingOptions:
    """What a run depends on. The learning rate follows the clock, so that it ends in time."""

    minutes: float = 28.0
    seed: int = 1
    batch_size: int = 32
    peak_learning_rate: float = 1e-3
    weight_decay: float = 0.05
    patch_loss_weight: float = 1.0
    threads: int = 2


@dataclass(frozen=True)
class Progress:
    """One line of the training log, averaged over the steps since the line before."""

    step: int
    seconds: float
    caption_loss: float
    patch_loss: float
    token_accuracy: float
    patch_accuracy: float
    relation_accuracy: float


class PatchHead(nn.Module):
    """Names the kind, colour, role and relation of what each patch shows; only for training."""

    def __init__(self, width: int) -> None:
        """Build one linear layer for the four sets of classes."""
        super().__init__()
        self.linear = nn.Linear(width, sum(_PATCH_CLASSES))

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Map states, float [batch, patches, width], to logits [batch, patches, classes] each."""
        logits: torch.Tensor = self.linear(states)
        parts: tuple[torch.Tensor, ...] = torch.split(logits, list(_PATCH_CLASSES), dim=-1)
        return parts


class _BatchStream(IterableDataset[Batch]):
    """Lets a worker process render the batches while the model trains."""

    def __init__(self, tokenizer: GPT2Tokenizer, size: ModelSize, options: TrainingOptions) -> None:
        self._arguments = (tokenizer, size, options.batch_size, options.seed)

    def __iter__(self) -> Iterator[Batch]:
        return batches(*self._arguments)


def train(output: Path, size: ModelSize, options: TrainingOptions) -> list[Progress]:
    """Train a captioner, saving it to `output` now and then, and return its log."""
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    tokenizer = train_tokenizer(size.vocabulary, options.seed)
    model = new_model(size, tokenizer)
    model.set_attn_implementation("eager")  # At this size faster on a CPU than the fused kernels.
    head = PatchHead(size.width)
    stream = DataLoader(_BatchStream(tokenizer, size, options), batch_size=None, num_workers=1)
    log: list[Progress] = []
    for progress in _steps(model, head, stream, options):
        log.append(progress)
        _LOGGER.info("%s", json.dumps(asdict(progress)))
        if progress.step % _SAVE_EVERY_STEPS == 0:
            save_checkpoint(output, model, tokenizer)
    save_checkpoint(output, model, tokenizer)
    return log


def _steps(
    model: VisionEncoderDecoderModel,
    head: PatchHead,
    stream: DataLoader[Batch],
    options: TrainingOptions,
) -> Iterator[Progress]:
    """Train until the time is up, yielding the log's lines."""
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = _optimizer(parameters, options)
    start = time.monotonic()
    sums = torch.zeros(5)
    for step, batch in enumerate(stream, start=1):
        seconds = time.monotonic() - start
        rate = options.peak_learning_rate * _rate_share(seconds / (60 * options.minutes))
        for group in optimizer.param_groups:
            group["lr"] = rate
        outcome = _measure(model, head, batch)
        loss = outcome.caption_loss + options.patch_loss_weight * outcome.patch_loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, _MAX_GRADIENT_NORM)
        optimizer.step()
        sums += outcome.figures()
        if step % _LOG_EVERY_STEPS == 0:
            figures = [round(value, 4) for value in (sums / _LOG_EVERY_STEPS).tolist()]
            yield Progress(step, round(seconds), *figures)
            sums.zero_()
        if rate == 0:
            return


@dataclass(frozen=True)
class _Outcome:
    """Losses and accuracies of one batch, each a scalar tensor."""

    caption_loss: torch.Tensor
    patch_loss: torch.Tensor
    token_accuracy: torch.Tensor
    patch_accuracy: torch.Tensor
    relation_accuracy: torch.Tensor

    def figures(self) -> torch.Tensor:
        """Return the numbers in their order, float [5], cut off from the graph."""
        return torch.stack([getattr(self, field.name) for field in fields(self)]).detach()


def _measure(model: VisionEncoderDecoderModel, head: PatchHead, batch: Batch) -> _Outcome:
    """Run the model and the head on a batch, as in training."""
    pixels = torch.from_numpy(batch.pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    tokens, patches = torch.from_numpy(batch.tokens), torch.from_numpy(batch.patch_labels)
    states = model.encoder(pixel_values=pixels.contiguous()).last_hidden_state
    logits = model.decoder(
        input_ids=_shift_right(tokens, model.config.decoder_start_token_id),
        encoder_hidden_states=states,
        use_cache=False,
    ).logits
    patch_logits = head(states[:, 1:])
    patch_losses = [_cross_entropy(part, patches[:, i]) for i, part in enumerate(patch_logits)]
    return _Outcome(
        caption_loss=_cross_entropy(logits, tokens),
        patch_loss=torch.stack(patch_losses).sum(),
        token_accuracy=_accuracy(logits, tokens),
        patch_accuracy=_accuracy(patch_logits[0], patches[:, 0]),
        relation_accuracy=_accuracy(patch_logits[3], patches[:, 3]),
    )


def _shift_right(tokens: torch.Tensor, start: int) -> torch.Tensor:
    """Turn target tokens, int64 [batch, length], into the decoder's input of the same shape."""
    starts = torch.full_like(tokens[:, :1], start)
    # Where a target is ignored, the output does not count, so that any input token will do.
    return torch.cat([starts, tokens[:, :-1]], dim=1).masked_fill(tokens == IGNORED, start)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean loss of logits [batch, n, classes] over those of labels [batch, n] that count."""
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def _accuracy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Share of the labels [batch, n] that count where logits [batch, n, classes] are right."""
    counted = labels != IGNORED
    return ((logits.argmax(-1) == labels) & counted).sum() / counted.sum()


def _optimizer(parameters: list[nn.Parameter], options: TrainingOptions) -> torch.optim.AdamW:
    """AdamW that decays matrices only, not biases, gains and the like."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)


def _rate_share(spent: float) -> float:
    """Share of the peak learning rate after this share of the time: linear warm-up, then cosine."""
    if spent < _WARMUP_SHARE:
        return max(spent / _WARMUP_SHARE, 1e-3)
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, spent))


def main() -> None:
    """Read the command line, train, and leave checkpoint and log in the output folder."""
    defaults = TrainingOptions()
    parser = argparse.ArgumentParser(description="Train the demo checkpoint.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=defaults.minutes)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--threads", type=int, default=defaults.threads)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = TrainingOptions(
        minutes=arguments.minutes,
        seed=arguments.seed,
        threads=arguments.threads,
    )
    log = train(arguments.output, ModelSize(), options)
    lines = [json.dumps(asdict(line)) for line in log]
    (arguments.output / "training_log.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

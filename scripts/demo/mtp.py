"""A layer that predicts the token after the next one, trained on the frozen model that it drafts for.

The layer is the one of DeepSeek-V3's report (arXiv:2412.19437, section 2.2): a projection of the next token's embedding
and of the model's normed output, one block like the model's last, and a norm; embedding and head are the model's.
It learns the model's own distribution of the token, since a draft counts where the model would have said the same.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .layout import Model, Tensors, to_checkpoint
from .recipe import JSON, Recipe
from .samples import SampleSource
from .training import Balancer, make_optimizers, rate_share

Report = Callable[[str], None]
_NAMES = {"norm": "shared_head.norm"}
"""The checkpoint's names of the layer's own parts where they are not those of :class:`PredictingLayer`."""


class PredictingLayer(nn.Module):
    """Predicts t[i+2] from the model's normed output at i and from t[i+1].

    Args:
        model: what it drafts for; the block begins as a copy of the model's last layer.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        size = model.config.hidden_size
        self.enorm, self.hnorm = copy.deepcopy(model.model.norm), copy.deepcopy(model.model.norm)
        for norm in (self.enorm, self.hnorm):
            nn.init.ones_(norm.weight)
        self.eh_proj = nn.Linear(2 * size, size, bias=False)
        for half in self.eh_proj.weight.data.split(size, dim=1):
            nn.init.eye_(half)
        self.block = copy.deepcopy(model.model.layers[-1])
        self.norm = copy.deepcopy(model.model.norm)
        self.requires_grad_(True)

    def forward(self, hidden: Tensor, embedded: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """[B, T, hidden_size] outputs and embeddings of the tokens behind them, to [B, T, hidden_size] for the head."""
        x = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1))
        normed: Tensor = self.norm(self.block(x, position_embeddings=rotation))
        return normed


@dataclass(frozen=True)
class Taught:
    """What the frozen model says of rows of ids.

    Attributes:
        hidden: [B, T, hidden_size], its normed outputs.
        logits: [B, T, vocab_size].
        embedded: [B, T, hidden_size], of the ids.
        rotation: of the positions.
    """

    hidden: Tensor
    logits: Tensor
    embedded: Tensor
    rotation: tuple[Tensor, Tensor]


@torch.no_grad()
def teach(model: Model, ids: Tensor) -> Taught:
    """Run the frozen model over [B, T] ids."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    embedded = model.model.embed_tokens(ids)
    rotation = model.model.rotary_emb(embedded, torch.arange(ids.shape[1]).unsqueeze(0))
    return Taught(hidden, model.lm_head(hidden), embedded, rotation)


def drafts(model: Model, layer: PredictingLayer, taught: Taught, depth: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of each of the next ``depth`` drafts, and what the model itself says of the same tokens.

    Draft ``d`` at place ``i`` is of t[i + d + 1]; the layer is given its own output and the true tokens in between.
    """
    hidden = taught.hidden
    for number in range(1, depth + 1):
        length = taught.hidden.shape[1] - number
        rotation = tuple(part[:, :length] for part in taught.rotation)
        hidden = layer(hidden[:, :length], taught.embedded[:, number:], rotation)
        yield model.lm_head(hidden), taught.logits[:, number:]


@torch.no_grad()
def continued(model: Model, ids: Tensor, length: int, temperature: float, generator: torch.Generator) -> Tensor:
    """[B, T] ids and ``length`` tokens more of each row; greedy at temperature 0."""
    cache: Any = None
    given = ids
    for _ in range(length):
        output = model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = output.past_key_values, output.logits[:, -1].float()
        if temperature:
            given = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            given = logits.argmax(-1, keepdim=True)
        ids = torch.cat((ids, given), dim=1)
    return ids


def own_text(model: Model, source: SampleSource, settings: JSON, seed: int) -> Tensor:
    """[N, T] rows that the model has written itself, half of them greedily, on beginnings of training rows."""
    generator = torch.Generator().manual_seed(seed)
    begin, length, wanted = (int(settings[name]) for name in ("own_prompt", "own_length", "own_rows"))
    rows: list[Tensor] = []
    number = 0
    while sum(map(len, rows)) < wanted:
        number -= 1  # batches of their own: training counts from 0 on
        prompts = torch.cat([source.batch(number - 1000 * part)[0][:, :begin] for part in range(4)])
        half = len(prompts) // 2
        for part, temperature in ((prompts[:half], 0.0), (prompts[half:], 1.0)):
            rows.append(continued(model, part, length - begin, temperature, generator))
    return torch.cat(rows)[:wanted]


@dataclass
class MtpProgress:
    """What training has done."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = 0.0


def train(model: Model, source: SampleSource, settings: JSON, budget: float, seed: int, report: Report) -> Any:
    """Train a layer for ``budget`` seconds, counted from the model's own text on.

    Returns:
        The layer and what was done.
    """
    layer, progress = PredictingLayer(model), MtpProgress()
    started = time.monotonic()
    own = own_text(model, source, settings, seed)
    report(f"{own.numel():,} tokens of the model's own in {time.monotonic() - started:.0f} s")
    optimizers = make_optimizers(layer, settings)
    rates = [[float(group["lr"]) for group in item.param_groups] for item in optimizers]
    balancer = Balancer(layer, float(settings["balance_rate"]))
    weights = [float(weight) for weight in settings["depth_weights"]]
    layer.train()
    shown = 0.0
    while (elapsed := time.monotonic() - started) < budget:
        share = rate_share(elapsed / budget, float(settings["warmup_share"]))
        for item, own_rates in zip(optimizers, rates, strict=True):
            for group, rate in zip(item.param_groups, own_rates, strict=True):
                group["lr"] = rate * share
        ids = _batch(source, own, progress.step, settings)
        with torch.autocast("cpu", torch.bfloat16):
            loss = _loss(model, layer, teach(model, ids), weights)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(layer.parameters(), float(settings["clip"]))
        for item in optimizers:
            item.step()
            item.zero_grad(set_to_none=True)
        balancer.update()
        value = float(loss.detach())
        progress.loss = value if not progress.step else 0.98 * progress.loss + 0.02 * value
        progress.step, progress.tokens = progress.step + 1, progress.tokens + ids.numel()
        progress.seconds = time.monotonic() - started
        if elapsed - shown > 10:
            shown = elapsed
            report(f"step {progress.step}  loss {progress.loss:.4f}  {elapsed / budget:.0%} of the time")
    return layer.eval(), progress


def _batch(source: SampleSource, own: Tensor, step: int, settings: JSON) -> Tensor:
    """Rows of the corpus, and every few steps of the model's own."""
    rows, length, every = (int(settings[name]) for name in ("batch_rows", "row_length", "own_every"))
    if step % every:
        return source.batch(step)[0][:rows, :length]
    first = step // every * rows % len(own)
    return torch.roll(own, -first, 0)[:rows]


def _loss(model: Model, layer: PredictingLayer, taught: Taught, weights: list[float]) -> Tensor:
    """Cross entropy with the model's own distribution as the target, of each depth by its weight."""
    total = torch.zeros(())
    for weight, (logits, target) in zip(weights, drafts(model, layer, taught, len(weights)), strict=True):
        flat = logits.float().flatten(0, 1), target.float().softmax(-1).flatten(0, 1)
        total = total + weight * nn.functional.cross_entropy(*flat)
    return total / sum(weights)


def layer_tensors(model: Model, layer: PredictingLayer, recipe: Recipe) -> Tensors:
    """The layer as a checkpoint stores it: one more layer behind the model's own, without copies of what it shares."""
    last = len(model.model.layers) - 1
    before, after = f"model.layers.{last}.", f"model.layers.{last + 1}."
    whole = copy.deepcopy(model)
    whole.model.layers[last] = layer.block
    stored = to_checkpoint(whole, {}, recipe)
    found = {name.replace(before, after): value for name, value in stored.items() if name.startswith(before)}
    own = {name: value for name, value in layer.named_parameters() if not name.startswith("block.")}
    for name, value in own.items():
        part, _, tensor = name.partition(".")
        found[f"{after}{_NAMES.get(part, part)}.{tensor}"] = value.detach().to(torch.bfloat16).contiguous()
    return found


@torch.no_grad()
def share_foretold(model: Model, layer: PredictingLayer, prompts: list[list[int]], length: int) -> tuple[int, int]:
    """Of ``length`` greedy tokens behind each prompt, how many the layer's best draft is, and of how many.

    Args:
        prompts: of one length. The first token behind each is not counted, since no draft is made of it.
    """
    given = torch.tensor(prompts)
    ids = continued(model, given, length, 0.0, torch.Generator())
    logits, _ = next(drafts(model, layer, teach(model, ids), 1))
    told = logits[:, given.shape[1] - 1 : -1].argmax(-1)
    return int((told == ids[:, given.shape[1] + 1 :]).sum()), told.numel()

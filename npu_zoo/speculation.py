"""Whether and how a run guesses next tokens, from what was asked. Nothing here imports torch."""

from __future__ import annotations

from npu_zoo.core.config import (
    DEFAULT_MTP_TOKENS,
    DEFAULT_NUM_SPECULATIVE_TOKENS,
    DEFAULT_PROMPT_LOOKUP,
    EngineArgs,
    SpeculationConfig,
)
from npu_zoo.core.errors import ConfigError
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.parallel import Split

MTP_LAYERS = "num_nextn_predict_layers"
"""The key of config.json that counts the layers which predict further tokens."""

MAX_MTP_TOKENS = 3
"""A layer that learned to predict the token after the next is guessing wildly beyond."""


def choose_speculation(args: EngineArgs, config: ModelConfig, split: Split) -> SpeculationConfig | None:
    """How a run guesses next tokens; None where it does not.

    Args:
        config: the checkpoint's hyperparameters.
        split: how ranks share the model.

    Raises:
        ConfigError: options contradict each other, or the checkpoint has nothing to guess by.
    """
    method = args.speculative_method or "none"
    _refuse_unread(args, method)
    if method == "none":
        return None
    adaptive = _is_adaptive(args)
    if method == "mtp":
        return SpeculationConfig(method, _mtp_tokens(args, config, split), adaptive=adaptive)
    shortest, longest = _lookup_bounds(args)
    return SpeculationConfig(method, asked_drafts(args), shortest, longest, adaptive)


def asked_drafts(args: EngineArgs) -> int:
    """Most drafts of a sequence in one step, as far as options tell; 0 without speculation."""
    if args.speculative_method in (None, "none"):
        return 0
    default = DEFAULT_MTP_TOKENS if args.speculative_method == "mtp" else DEFAULT_NUM_SPECULATIVE_TOKENS
    return args.num_speculative_tokens or default


def _mtp_tokens(args: EngineArgs, config: ModelConfig, split: Split) -> int:
    """How many drafts the layer that predicts further tokens makes."""
    other = "--speculative-method prompt_lookup works with every model and layout"
    what = f"speculative_method=mtp drafts with a layer that predicts further tokens ({MTP_LAYERS} of config.json)"
    if not config.num_mtp_layers:
        raise ConfigError(f"{what}, and the checkpoint has none; {other}")
    if split.pp > 1 or split.dp > 1:
        raise ConfigError(
            f"{what}, which needs embedding and head on one rank and every sequence in one cache: pipeline stages and "
            f"replicas, {split.describe()}, cannot take it; take tensor or expert parallelism, or {other}"
        )
    count = asked_drafts(args)
    if count > MAX_MTP_TOKENS:
        raise ConfigError(
            f"num_speculative_tokens={count} is more than speculative_method=mtp guesses from one layer: "
            f"1 to {MAX_MTP_TOKENS}"
        )
    return count


def _refuse_unread(args: EngineArgs, method: str) -> None:
    """Refuse options that the method does not read, since whoever gives one expects something of it."""
    lookup = ("prompt_lookup_min", "prompt_lookup_max") if method != "prompt_lookup" else ()
    names = (*lookup, *(("num_speculative_tokens", "adaptive_speculation") if method == "none" else ()))
    unread = [f"{name}={value}" for name in names if (value := getattr(args, name)) is not None]
    if unread:
        raise ConfigError(
            f"{', '.join(unread)} says nothing with speculative_method={method}; leave it out, or give "
            "--speculative-method prompt_lookup"
        )


def _is_adaptive(args: EngineArgs) -> bool:
    if args.deterministic and args.adaptive_speculation:
        raise ConfigError(
            "adaptive_speculation=True drafts as steps turn out to take time, which deterministic=True forbids; leave "
            "one of them out"
        )
    return args.adaptive_speculation is not False and not args.deterministic


def _lookup_bounds(args: EngineArgs) -> tuple[int, int]:
    shortest, longest = args.prompt_lookup_min, args.prompt_lookup_max
    if shortest is not None and longest is not None and shortest > longest:
        raise ConfigError(f"prompt_lookup_min={shortest} is above prompt_lookup_max={longest}; swap them")
    least, most = DEFAULT_PROMPT_LOOKUP
    return shortest or min(least, longest or least), longest or max(most, shortest or most)

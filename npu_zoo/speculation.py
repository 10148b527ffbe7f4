"""Whether and how a run guesses next tokens, from what was asked. Nothing here imports torch."""

from __future__ import annotations

from npu_zoo.core.config import (
    DEFAULT_NUM_SPECULATIVE_TOKENS,
    DEFAULT_PROMPT_LOOKUP,
    EngineArgs,
    SpeculationConfig,
)
from npu_zoo.core.errors import ConfigError
from npu_zoo.core.model_config import ModelConfig

MTP_LAYERS = "num_nextn_predict_layers"
"""The key of config.json that counts the layers which predict further tokens."""


def choose_speculation(args: EngineArgs, config: ModelConfig) -> SpeculationConfig | None:
    """How a run guesses next tokens; None where it does not.

    Args:
        config: the checkpoint's hyperparameters.

    Raises:
        ConfigError: options contradict each other, or the checkpoint has nothing to guess by.
    """
    method = args.speculative_method or "none"
    _refuse_unread(args, method)
    if method == "none":
        return None
    if method == "mtp":
        raise ConfigError(_why_no_mtp(config))
    shortest, longest = _lookup_bounds(args)
    return SpeculationConfig(method, asked_drafts(args), shortest, longest, _is_adaptive(args))


def asked_drafts(args: EngineArgs) -> int:
    """Most drafts of a sequence in one step, as far as options tell; 0 without speculation."""
    if args.speculative_method in (None, "none"):
        return 0
    return args.num_speculative_tokens or DEFAULT_NUM_SPECULATIVE_TOKENS


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


def _why_no_mtp(config: ModelConfig) -> str:
    layers = config.extra.get(MTP_LAYERS)
    has = f"the {layers} of the checkpoint are left out by this version" if layers else "the checkpoint has none"
    return (
        f"speculative_method=mtp drafts with layers that predict further tokens ({MTP_LAYERS} of config.json), and "
        f"{has}; --speculative-method prompt_lookup works with every model"
    )

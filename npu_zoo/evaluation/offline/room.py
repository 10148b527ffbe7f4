"""Which cases an engine can run with all of a batch at once, and which would fit in the place of others."""

from __future__ import annotations

from dataclasses import dataclass

from npu_zoo.core.engine import Engine
from npu_zoo.evaluation.offline.cases import Case


@dataclass(frozen=True)
class Room:
    """An engine's limits.

    Attributes:
        max_model_len: of one sequence, in tokens.
        max_num_seqs, max_num_batched_tokens: of one step.
        slots: parts of the room for keys and values of one replica; None where the engine does not tell.
        slot_size: tokens of one part: a block, or all that a sequence may have.
        replicas: of the attention, each of which has its own room.
    """

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    slots: int | None = None
    slot_size: int = 1
    replicas: int = 1

    @classmethod
    def of(cls, engine: Engine) -> Room:
        """That of an engine which has started."""
        config, explained = engine.config, engine.explain()
        longest = explained.get("max_model_len") or config.max_model_len
        tokens, replicas = explained.get("kv_cache_tokens"), config.data_parallel_size
        size = longest if config.attention == "flash" else (config.attention_choice.block_size or 1)
        slots = None if tokens is None else tokens // replicas // size
        return cls(longest, config.max_num_seqs, config.max_num_batched_tokens, slots, size, replicas)

    def largest_batch(self, length: int) -> int:
        """Sequences of so many tokens at their end that run at once; 0 where not even one does."""
        if length > self.max_model_len:
            return 0
        most = min(self.max_num_seqs, self.max_num_batched_tokens)
        return most if self.slots is None else min(most, self.replicas * (self.slots // self._slots(length)))

    def longest(self, batch: int) -> int:
        """Tokens that each of so many sequences may have at its end; 0 where not even one."""
        if batch > min(self.max_num_seqs, self.max_num_batched_tokens):
            return 0
        if self.slots is None:
            return self.max_model_len
        own = self.slots // -(-batch // self.replicas) * self.slot_size
        return min(self.max_model_len, own + 1) if own else 0

    def refusal(self, case: Case) -> str | None:
        """Why a case cannot run, with what could; None where it can."""
        if case.length > self.max_model_len:
            return too_long(case, self.max_model_len)
        if case.batch <= self.largest_batch(case.length):
            return None
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            if case.batch > (limit := getattr(self, name)):
                return f"{case.batch} sequences do not run at once with --{name.replace('_', '-')} {limit}; raise it"
        return self._lacks_memory(case)

    def _lacks_memory(self, case: Case) -> str:
        have = (self.slots or 0) * self.slot_size * self.replicas
        need = case.batch * self._slots(case.length) * self.slot_size
        fits = [f"batch {batch}"] if (batch := self.largest_batch(case.length)) else []
        fits += [f"{length} tokens each"] if (length := self.longest(case.batch)) > 1 else []
        way_out = f"; {' or '.join(fits)} would fit" if fits else ""
        return f"it takes keys and values of {need:,} tokens, and there is room for {have:,}{way_out}"

    def _slots(self, length: int) -> int:
        """Parts that one sequence takes; the keys and values of its last token are never computed."""
        return -(-max(1, length - 1) // self.slot_size)


def too_long(case: Case, limit: int) -> str:
    """Why a case is too long for a limit of tokens, with a pair of the same proportions that is not."""
    text = f"{case.input} + {case.output} tokens are more than the {limit} of the longest sequence"
    first = max(1, limit * case.input // case.length)
    return f"{text}; [{first},{limit - first}] would fit" if limit > 1 else text

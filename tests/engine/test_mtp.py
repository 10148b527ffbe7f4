"""Drafts by the checkpoint's layer for further tokens: as of transformers' classes, and with plain decoding's texts.

The oracle is built of transformers' decoder layer and norm, on the same weights, over whole sequences without a cache.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from npu_zoo import LLM, SamplingParams
from npu_zoo.communication import bytes_of, calls_of, draft_operations
from npu_zoo.core.attention import SequenceSlice
from npu_zoo.core.config import EngineArgs, EngineConfig
from npu_zoo.core.engine import RequestOutput
from npu_zoo.core.errors import EngineError, WeightsError
from npu_zoo.core.parallel import Split
from npu_zoo.dispatch import resolve
from npu_zoo.engine.runner import ModelRunner
from npu_zoo.engine.speculation.control import SpeculationControl
from npu_zoo.engine.speculation.steps import STEPS_AT_ONCE, DraftRow, SeenStep, by_row
from npu_zoo.engine.step import StepRow
from npu_zoo.nn.context import ForwardContext
from npu_zoo.nn.mtp import MTPForCausalLM
from npu_zoo.parallel.groups import Joined
from npu_zoo.testing.checkpoints import write_checkpoint
from npu_zoo.testing.ranks import run_ranks
from npu_zoo.weights.convert import convert
from npu_zoo.weights.plan import ConvertOptions, plan_conversion
from npu_zoo.weights.quantize import Scheme

FAMILY = "deepseek_v3"
HELDOUT = Path(__file__).parent.parent / "data" / "demo_heldout"
LAYERS, HIDDEN = 2, 64
SHAPE: dict[str, Any] = {
    "num_hidden_layers": LAYERS + 1, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "kv_lora_rank": 32, "q_lora_rank": 48, "qk_rope_head_dim": 16, "qk_nope_head_dim": 24, "v_head_dim": 24,
    "n_group": 2, "topk_group": 1, "head_dim": None,
}  # fmt: skip
MTP: dict[str, Any] = {"speculative_method": "mtp", "adaptive_speculation": False}
PROMPT = (5, 17, 200, 31, 9, 9, 4, 250, 33, 2, 61)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer more than the checkpoint's, which is the oracle's."""
    directory = tmp_path_factory.mktemp("whole")
    return write_checkpoint(directory, architecture="DeepseekV3ForCausalLM", tokenizer=False, **SHAPE)


@pytest.fixture(scope="module")
def tiny(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a checkpoint whose last layer predicts further tokens, with copies of embedding and head."""
    directory = tmp_path_factory.mktemp("tiny")
    tensors, generator = load_file(whole / "model.safetensors"), torch.Generator().manual_seed(7)
    own = f"model.layers.{LAYERS}."
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{own}{name}.weight"] = 1 + 0.3 * torch.randn(HIDDEN, generator=generator)
    tensors[f"{own}eh_proj.weight"] = 0.2 * torch.randn(HIDDEN, 2 * HIDDEN, generator=generator)
    tensors[f"{own}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{own}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    raw = json.loads((whole / "config.json").read_text("utf-8"))
    stated = raw | {"num_hidden_layers": LAYERS, "num_nextn_predict_layers": 1}
    (directory / "config.json").write_text(json.dumps(stated), "utf-8")
    return directory


class Oracle:
    """The layer of transformers' classes, on whole sequences.

    Args:
        whole: a checkpoint of the model with its predicting layer's block as its last layer.
        tiny: the checkpoint that is tested, with the tensors that transformers knows nothing of.
    """

    def __init__(self, whole: Path, tiny: Path) -> None:
        from transformers import DeepseekV3ForCausalLM

        options: dict[str, Any] = {"dtype": torch.float32, "experts_implementation": "eager"}
        self.model: Any = DeepseekV3ForCausalLM.from_pretrained(whole, **options).eval()
        norm = type(self.model.model.norm)
        tensors, self.norms = load_file(tiny / "model.safetensors"), {}
        for name in ("enorm", "hnorm", "shared_head.norm"):
            self.norms[name] = norm(HIDDEN, eps=1e-6)
            self.norms[name].weight.data = tensors[f"model.layers.{LAYERS}.{name}.weight"]
        self.projection = tensors[f"model.layers.{LAYERS}.eh_proj.weight"]

    def _layer(self, number: int, x: Tensor) -> Tensor:
        inner = self.model.model
        rotation = inner.rotary_emb(x, torch.arange(x.shape[1]).unsqueeze(0))
        output: Tensor = inner.layers[number](x, position_embeddings=rotation)
        return output

    @torch.no_grad()
    def hidden(self, ids: Sequence[int]) -> Tensor:
        """[T, hidden_size], the model's output behind its last norm."""
        x = self.model.model.embed_tokens(torch.tensor([list(ids)]))
        for number in range(LAYERS):
            x = self._layer(number, x)
        normed: Tensor = self.model.model.norm(x)[0]
        return normed

    @torch.no_grad()
    def predict(self, hidden: Tensor, following: Sequence[int]) -> Tensor:
        """[T, hidden_size] for the head, of the tokens after the next."""
        embedded = self.model.model.embed_tokens(torch.tensor(list(following)))
        both = torch.cat((self.norms["enorm"](embedded), self.norms["hnorm"](hidden)), dim=-1)
        x = self._layer(LAYERS, (both @ self.projection.t()).unsqueeze(0))
        normed: Tensor = self.norms["shared_head.norm"](x)[0]
        return normed

    @torch.no_grad()
    def drafts(self, ids: Sequence[int], count: int) -> list[int]:
        """What follows all of ``ids``, one guess after the other, each from the layer's own last output."""
        hidden, following, found = self.hidden(ids[:-1]), list(ids[1:]), []
        for _ in range(count):
            predicted = self.predict(hidden, following)
            found.append(int(self.model.lm_head(predicted[-1]).argmax()))
            hidden, following = torch.cat((hidden, predicted[-1:])), [*following, found[-1]]
        return found


@pytest.fixture(scope="module")
def oracle(whole: Path, tiny: Path) -> Oracle:
    return Oracle(whole, tiny)


def config_of(weights: Path, **options: Any) -> EngineConfig:
    asked: dict[str, Any] = {
        "model": f"{FAMILY}:custom", "weights": str(weights), "hardware": "cpu", "dtype": "float32", "threads": 1,
        "max_model_len": 128, "kv_cache_memory": "8MiB", "block_size": 16, "skip_tokenizer_init": True,
    }  # fmt: skip
    return resolve(EngineArgs(**{**asked, **options}))


def runner_of(weights: Path, **options: Any) -> ModelRunner:
    return ModelRunner(config_of(weights, **MTP, num_speculative_tokens=3, **options))


def test_the_layer_is_what_transformers_classes_make_of_it(tiny: Path, oracle: Oracle) -> None:
    runner = runner_of(tiny)
    ids, following = PROMPT[:-1], list(PROMPT[1:])
    (hidden,) = runner.execute([StepRow(ids, 0, (3,), num_logits=1, wants_prompt=True)])[1]
    assert torch.allclose(hidden, oracle.hidden(ids), atol=1e-4)
    context = ForwardContext(runner.attention, runner.attention.prepare([SequenceSlice(0, len(ids), (3,))]))
    model = runner.model
    assert isinstance(model, MTPForCausalLM)
    found = model.predict_further(hidden, torch.tensor(following), torch.arange(len(ids)), context)
    due = oracle.predict(hidden, following)
    assert due.abs().max() > 1
    assert torch.allclose(found, due, atol=1e-4)


def see(runner: ModelRunner, rows: list[DraftRow], number: int | None = None) -> list[list[int]]:
    """What the layer guesses once it has seen a step, by default the last."""
    return runner.draft([SeenStep(number or runner.num_steps, tuple(rows))])


def drafts_of(runner: ModelRunner, ids: Sequence[int], pieces: Sequence[int], count: int) -> list[int]:
    """Drafts of what follows all of ``ids``, whose last one is new; the others are computed in pieces."""
    start, found, slots = 0, [[]], (5, 2)
    for number in pieces:
        runner.execute([StepRow(tuple(ids[start : start + number]), start, slots, 1, wants_prompt=False)])
        following = tuple(ids[start + 1 : start + 1 + number])
        start += number
        found = see(runner, [DraftRow(following, slots, count * (start == len(ids) - 1))])
    assert start == len(ids) - 1
    return found[0]


@pytest.mark.parametrize("pieces", [(10,), (4, 6), (9, 1), (1,) * 10], ids=str)
def test_each_guess_is_the_one_that_whole_sequences_give(tiny: Path, oracle: Oracle, pieces: tuple[int, ...]) -> None:
    assert drafts_of(runner_of(tiny), PROMPT, pieces, 3) == oracle.drafts(PROMPT, 3)


def test_rows_that_want_different_numbers_of_guesses(tiny: Path, oracle: Oracle) -> None:
    runner = runner_of(tiny)
    texts, counts = [PROMPT, PROMPT[::-1], PROMPT[:4], PROMPT[2:9]], [1, 3, 0, 2]
    rows = [StepRow(text[:-1], 0, (number,), 1, wants_prompt=False) for number, text in enumerate(texts)]
    runner.execute(rows)
    wanted = [DraftRow(tuple(t[1:]), (n,), count) for n, (t, count) in enumerate(zip(texts, counts, strict=True))]
    found = see(runner, wanted)
    assert found == [oracle.drafts(text, count) for text, count in zip(texts, counts, strict=True)]


def test_wrong_drafts_leave_nothing_behind(tiny: Path, oracle: Oracle) -> None:
    """A row of verified drafts counts as far as they were right; the others' places are written over."""
    runner, slots = runner_of(tiny), (5, 2)
    runner.execute([StepRow(PROMPT[:7], 0, slots, 1, wants_prompt=False)])
    see(runner, [DraftRow(PROMPT[1:8], slots, 3)])
    runner.execute([StepRow((PROMPT[7], PROMPT[8], 77, 78), 7, slots, 4, wants_prompt=False)])
    found = see(runner, [DraftRow(PROMPT[8:10], slots, 3)])
    assert found == [oracle.drafts(PROMPT[:10], 3)]


def test_a_step_that_is_not_kept_gives_no_drafts(tiny: Path) -> None:
    runner = runner_of(tiny)
    for _ in range(STEPS_AT_ONCE + 2):
        runner.execute([StepRow(PROMPT, 0, (1,), 1, wants_prompt=False)])
    wanted = [DraftRow((*PROMPT[1:], 8), (1,), 2)]
    assert see(runner, wanted, 1) == [[]]  # forgotten
    assert [len(own) for own in see(runner, wanted)] == [2]
    assert see(runner, wanted) == [[]]  # seen


def test_steps_that_are_seen_at_once(tiny: Path, oracle: Oracle) -> None:
    """Two sequences' chunks and single tokens in turns, one of them with a wrong draft."""
    runner, steps = runner_of(tiny, block_size=4), []
    texts, slots = (PROMPT, PROMPT[::-1]), ((5, 2, 9, 10), (3, 7, 8, 11))
    pieces = [(0, 4), (4, 1), (5, 3), (8, 1), (9, 1)]
    for start, count in pieces:
        ids = [(*text[start : start + count - 1], 77 if count == 3 else text[start + count - 1]) for text in texts]
        logits = 1 if start == 0 else count
        runner.execute([StepRow(own, start, s, logits, False) for own, s in zip(ids, slots, strict=True)])
        stand = count - (count == 3)
        rows = tuple(DraftRow(text[start + 1 : start + 1 + stand]) for text in texts)
        steps.append(SeenStep(runner.num_steps, rows))
        if count == 3:  # the place of the wrong draft is computed anew
            runner.execute([StepRow(text[7:8], 7, s, 1, False) for text, s in zip(texts, slots, strict=True)])
            steps.append(SeenStep(runner.num_steps, tuple(DraftRow(text[8:9]) for text in texts)))
    wanted = tuple(DraftRow(text[-1:], s, 3) for text, s in zip(texts, slots, strict=True))
    found = runner.draft([*steps[:-1], SeenStep(runner.num_steps, wanted)])
    assert found == [oracle.drafts(text, 3) for text in texts]


def test_room_that_another_sequence_has_taken_is_that_ones(tiny: Path, oracle: Oracle) -> None:
    runner, other = runner_of(tiny), PROMPT[::-1]
    for text in (PROMPT, other):
        runner.execute([StepRow(text[:-1], 0, (4,), 1, wants_prompt=False)])
    earlier = SeenStep(1, (DraftRow(PROMPT[1:]),))
    assert runner.draft([earlier, SeenStep(2, (DraftRow(other[1:], (4,), 3),))]) == [oracle.drafts(other, 3)]


def test_drafts_go_back_to_their_rows() -> None:
    rows = [DraftRow((), (), count) for count in (1, 0, 3, 2)]
    assert by_row(rows, [20, 30, 0, 21, 31, 22]) == [[0], [], [20, 21, 22], [30, 31]]


def test_without_the_method_nothing_of_the_layer_is_loaded(tiny: Path, tmp_path: Path) -> None:
    plain, drafting = ModelRunner(config_of(tiny)), runner_of(tiny)
    tensors = load_file(tiny / "model.safetensors")
    layer = {name: value for name, value in tensors.items() if name.startswith(f"model.layers.{LAYERS}.")}
    copies = ("embed_tokens", "shared_head.head")
    own = sum(value.nbytes for name, value in layer.items() if not any(copy in name for copy in copies))
    assert drafting.parameter_bytes - plain.parameter_bytes == own > 0
    per_token = [runner.own_report()["kv_cache_bytes"] / runner.cache.num_tokens for runner in (plain, drafting)]
    assert per_token[1] / per_token[0] == (LAYERS + 1) / LAYERS
    with pytest.raises(EngineError, match="started without speculative_method=mtp"):
        plain.draft([SeenStep(1, ())])
    save_file({name: value for name, value in tensors.items() if name not in layer}, tmp_path / "model.safetensors")
    shutil.copy(tiny / "config.json", tmp_path)
    assert ModelRunner(config_of(tmp_path)).parameter_bytes == plain.parameter_bytes
    with pytest.raises(WeightsError, match=r"drafts with layer 2, .* lacks 42 tensors .*prompt_lookup"):
        ModelRunner(config_of(tmp_path, **MTP))


@pytest.mark.parametrize("split", [Split(2), Split(2, ep=2), Split(4)], ids=["tp 2", "tp 2, ep 2", "tp 4"])
def test_ranks_guess_as_one_does(tiny: Path, oracle: Oracle, split: Split) -> None:
    sizes = {"tensor_parallel_size": split.tp, "expert_parallel_size": split.ep}
    config = config_of(tiny, **MTP, num_speculative_tokens=3, **sizes)

    def rank(joined: Joined) -> list[int]:
        return drafts_of(ModelRunner(config, ranks=joined.ranks), PROMPT, (10,), 3)

    assert run_ranks(split, rank) == [oracle.drafts(PROMPT, 3)] * split.tp


@pytest.mark.parametrize("split", [Split(2), Split(2, ep=2), Split(4)], ids=["tp 2", "tp 2, ep 2", "tp 4"])
def test_ranks_say_what_the_closed_form_says(tiny: Path, split: Split) -> None:
    sizes = {"tensor_parallel_size": split.tp, "expert_parallel_size": split.ep}
    config = config_of(tiny, **MTP, num_speculative_tokens=3, **sizes)
    rows = [StepRow(PROMPT, 0, (0,), 1, wants_prompt=False), StepRow(PROMPT[:5], 0, (1,), 1, wants_prompt=False)]
    wanted = [DraftRow((*PROMPT[1:], 8), (0,), 2), DraftRow((*PROMPT[1:5], 9), (1,), 3)]

    def rank(joined: Joined) -> tuple[Counter[str], Counter[str]]:
        runner = ModelRunner(config, ranks=joined.ranks)
        runner.execute(rows)
        joined.traffic.calls.clear()
        joined.traffic.bytes.clear()
        see(runner, wanted, 1)
        return joined.traffic.calls, joined.traffic.bytes

    for number, (calls, sizes_given) in enumerate(run_ranks(split, rank)):
        place = split.place(number)
        due = list(draft_operations(config.model_config, place, (16, 2, 1), (2, 2, 1), "float32"))
        assert calls == Counter(calls_of(due))
        assert sizes_given == Counter(bytes_of(due))


def test_a_quantized_checkpoint_has_a_quantized_layer(tiny: Path, tmp_path: Path) -> None:
    convert(plan_conversion(tiny, ConvertOptions("hf-safetensors", scheme=Scheme.of("w8a16"))), tmp_path / "w8a16")
    runner = runner_of(tmp_path / "w8a16", allow_experimental=True)
    layer = runner.model.get_submodule(f"model.layers.{LAYERS}")
    assert layer.get_submodule("self_attn.o_proj").quantization is not None
    assert layer.get_submodule("eh_proj").quantization is None
    assert len(drafts_of(runner, PROMPT, (10,), 3)) == 3
    texts = [
        tokens(
            LLM.from_config(config_of(tmp_path / "w8a16", allow_experimental=True, **own)).generate([[5, 9]], GREEDY)
        )
        for own in ({}, {**MTP, "num_speculative_tokens": 2})
    ]
    assert texts[0] == texts[1]


# Texts


DEMO: dict[str, Any] = {"hardware": "cpu", "dtype": "float32", "max_model_len": 512, "kv_cache_memory": "64MiB"}
GREEDY = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=0.9, top_p=0.95, seed=3, n=2, repetition_penalty=1.05)
TEXTS = [
    "def add(a, b):\n    return a + b\n\n\n" * 4,
    "class Stack:\n    def __init__(self",
    "import os\nimport sys\n\n\ndef main(",
    "for name in names:\n    print(name)\n",
]


def demo(**options: Any) -> LLM:
    return LLM(f"{FAMILY}:demo", **{**DEMO, **options})


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [completion.token_ids for output in outputs for completion in output.outputs]


@pytest.fixture(scope="module")
def due() -> dict[str, list[list[int]]]:
    with demo() as plain:
        return {name: tokens(plain.generate(TEXTS, params)) for name, params in WAYS.items()}


WAYS = {"greedy": GREEDY, "sampled": SAMPLED}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_texts_are_those_of_plain_decoding(due: dict[str, list[list[int]]], count: int) -> None:
    with demo(**MTP, num_speculative_tokens=count) as llm:
        for name, params in WAYS.items():
            for _ in range(2):  # the second time from the prefix cache
                found = llm.generate(TEXTS, params)
                assert tokens(found) == due[name]
        assert found[0].metrics.cached_tokens > 0
        stats = llm.engine.stats()
        assert count == 1 or stats.num_draft_tokens > stats.num_drafts
        assert stats.num_draft_tokens <= count * stats.num_drafts
        assert stats.num_accepted_tokens > 0.3 * stats.num_drafts


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 16, "max_num_batched_tokens": 7},
        {"block_size": 16, "max_num_seqs": 2},
        {"block_size": 16, "kv_cache_memory": 4 * 576 * 4 * 16 * 12, "max_model_len": 160},
        {"enable_prefix_caching": False},
        {"tensor_parallel_size": 2},
    ],
    ids=["chunks", "two at a time", "preemption", "no prefixes", "tp 2"],
)
def test_texts_are_the_same_in_every_way(due: dict[str, list[list[int]]], options: dict[str, Any]) -> None:
    with demo(**MTP, num_speculative_tokens=3, **options) as llm:
        found = llm.generate(TEXTS, GREEDY)
        assert tokens(found) == due["greedy"]
        stats = llm.engine.stats()
        assert (stats.num_preemptions > 0) == ("max_model_len" in options)
        assert stats.num_accepted_tokens > 0.3 * stats.num_drafts


def spied(llm: LLM) -> dict[tuple[int, ...], list[int]]:
    """Every draft from now on, by what it follows."""
    seen: dict[tuple[int, ...], list[int]] = {}
    proposer: Any = llm.engine.speculator._proposer  # type: ignore[attr-defined]
    propose = proposer.propose

    def spy(requests: Any) -> Any:
        found = propose(requests)
        seen.update({tuple(r.sequence.token_ids): own for r, own in zip(requests, found, strict=True)})
        return found

    proposer.propose = spy
    return seen


def test_what_the_layer_has_seen_is_complete_after_chunks_and_rests() -> None:
    """Drafts are the same however a prompt was cut, and behind steps after which none were asked for."""
    prompt = list(range(20, 90))
    whole, cut, rested = (
        demo(**MTP, num_speculative_tokens=2, block_size=16, **options)
        for options in ({}, {"max_num_batched_tokens": 9}, {})
    )
    resting = SpeculationControl(adaptive=False)
    asked: list[int] = []
    resting.wants_drafts = lambda batch: bool(asked.append(batch)) or len(asked) % 5 == 0  # type: ignore[func-returns-value, method-assign]
    rested.engine.speculator._control = resting  # type: ignore[attr-defined]
    spies = [spied(llm) for llm in (whole, cut, rested)]
    texts = [tokens(llm.generate([prompt], GREEDY)) for llm in (whole, cut, rested)]
    assert texts[0] == texts[1] == texts[2]
    assert spies[0] == spies[1]
    common = [prefix for prefix in spies[2] if prefix in spies[0]]
    assert len(common) > 3
    assert all(spies[2][prefix] == spies[0][prefix] for prefix in common)


def test_a_hit_of_the_prefix_cache_leaves_drafts_as_good() -> None:
    """The same prompt again: only the last place of its shared blocks may have seen another token."""
    prompt = list(range(20, 84))
    llm = demo(**MTP, num_speculative_tokens=1, block_size=16)
    spy = spied(llm)
    llm.generate([prompt], GREEDY)
    first = dict(spy)
    (again,) = llm.generate([prompt], GREEDY)
    assert again.metrics.cached_tokens == 48
    assert sum(spy[prefix] == own for prefix, own in first.items()) >= 0.9 * len(first) > 10


def heldout(count: int) -> list[str]:
    """Beginnings of texts that neither the model nor its layer was trained on."""
    files = sorted(HELDOUT.glob("*.py.txt"))
    texts = [file.read_text("utf-8") for file in files]
    return [text[start : start + 300] for text in texts for start in range(0, len(text) - 300, 4000)][:count]


def test_the_demos_layer_foretells_most_greedy_tokens_of_heldout_text() -> None:
    """Of 1,024 tokens chance guesses one in a thousand, and the most frequent one stands at far less than half."""
    prompts = heldout(12)
    assert len(prompts) == 12
    with demo(**MTP, num_speculative_tokens=1, max_num_seqs=12) as one:
        found = one.generate(prompts, replace(GREEDY, max_tokens=64))
        stats = one.engine.stats()
    assert stats.num_accepted_tokens / stats.num_draft_tokens > 0.65
    frequent = max(sum(ids.count(t) for ids in tokens(found)) for t in range(1024))
    assert frequent < 0.4 * sum(map(len, tokens(found)))
    with demo(**MTP, num_speculative_tokens=3, max_num_seqs=12) as three:
        assert tokens(three.generate(prompts, replace(GREEDY, max_tokens=64))) == tokens(found)
        more = three.engine.stats()
    assert more.num_accepted_tokens / more.num_drafts > 1.2 * stats.num_accepted_tokens / stats.num_drafts

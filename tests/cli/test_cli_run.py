"""``run`` over a stand-in for the engine: where prompts come from, and how results are written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from npu_zoo.cli.results import COMPLETION_KEYS, RESULT_KEYS, printable
from npu_zoo.core.config import EngineConfig
from npu_zoo.core.engine import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from npu_zoo.core.sampling import SamplingParams, StructuredOutputs
from npu_zoo.engine.llm import LLM

MODEL = ("--model", "deepseek_coder:demo", "--hardware", "cpu")
FROM_CONFIG = LLM.__dict__["from_config"]


REMARK = "nothing was kept"


class EchoLLM:
    """Answers every prompt with itself in capitals, the last prompt first."""

    interrupt_after: int | None = None

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.calls: list[tuple[str, Any, SamplingParams]] = []
        self.partial_outputs: list[RequestOutput] = []
        self.engine = SimpleNamespace(explain=lambda: {"packed_weights": {"remark": REMARK}})

    def __enter__(self) -> EchoLLM:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def generate(self, prompts: Sequence[Any], params: SamplingParams, on_output: Callable) -> list[RequestOutput]:
        self.calls.append(("generate", list(prompts), params))
        return self._finish([p if isinstance(p, str) else f"ids {list(p)}" for p in prompts], params, on_output)

    def chat(self, messages: Sequence[Any], params: SamplingParams, on_output: Callable) -> list[RequestOutput]:
        self.calls.append(("chat", list(messages), params))
        return self._finish([conversation[-1]["content"] for conversation in messages], params, on_output)

    def infill(self, prefix: str, suffix: str, params: SamplingParams, on_output: Callable) -> list[RequestOutput]:
        self.calls.append(("infill", (prefix, suffix), params))
        return self._finish([f"{prefix}[]{suffix}"], params, on_output)

    def _finish(self, texts: list[str], params: SamplingParams, on_output: Callable) -> list[RequestOutput]:
        finished = [self._output(index, text.upper(), params.n, "stop") for index, text in enumerate(texts)]
        for output in finished:
            self._add_asked(output, params)
        for done, output in enumerate(reversed(finished)):
            if done == self.interrupt_after:
                rest = [self._output(i, text.upper()[:2], params.n, "abort") for i, text in enumerate(texts)]
                self.partial_outputs = rest[: len(texts) - done] + finished[len(texts) - done :]
                raise KeyboardInterrupt
            on_output(output)
        return finished

    @staticmethod
    def _output(index: int, text: str, n: int, reason: Any) -> RequestOutput:
        outputs = [CompletionOutput(i, text + "!" * i, list(range(len(text))), finish_reason=reason) for i in range(n)]
        metrics = RequestMetrics(arrival_time=1.0, first_token_time=1.5, finished_time=3.0)
        return RequestOutput(str(index), None, [1], outputs, finished=True, metrics=metrics)

    @staticmethod
    def _add_asked(output: RequestOutput, params: SamplingParams) -> None:
        for completion in output.outputs:
            completion.stop_reason = params.stop_strings[0] if params.stop_strings else None
            completion.logprobs = [{7: Logprob(-0.5, 1, "a")}] if params.logprobs else None
        output.prompt_logprobs = [None] if params.prompt_logprobs else None


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[EchoLLM]:
    """The stand-ins that were started."""
    made: list[EchoLLM] = []

    def from_config(config: EngineConfig, progress: Any = None) -> EchoLLM:
        made.append(EchoLLM(config))
        return made[-1]

    monkeypatch.setattr(LLM, "from_config", from_config)
    return made


def results(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_one_prompt_writes_its_completion_alone(cli: Callable, started: list[EchoLLM]) -> None:
    ran = cli("run", *MODEL, "--prompt", "ab")
    assert (ran.code, ran.out) == (0, "AB\n")
    assert f"note: {REMARK}\n" in ran.err
    assert "tokens/s" in ran.err.splitlines()[-1]
    assert cli("run", *MODEL, "--prompt", "ab", "--echo").out == "abAB\n"


def test_several_prompts_come_in_order_under_headers(cli: Callable, started: list[EchoLLM]) -> None:
    assert cli("run", *MODEL, "--prompt", "b", "--prompt", "a\nc").out == "==> [1] b <==\nB\n==> [2] a c <==\nA\nC\n"


def test_options_come_before_the_file_and_no_line_is_dropped(
    cli: Callable, started: list[EchoLLM], tmp_path: Path
) -> None:
    lines = [f"prompt {number} \u2028\x0c\x85 end" for number in range(50)]
    (tmp_path / "p.txt").write_bytes("\r\n".join(lines).encode())
    ran = cli("run", *MODEL, "--prompt", "first", "--prompts-file", str(tmp_path / "p.txt"), "--json")
    assert [found["prompt"] for found in results(ran.out)] == ["first", *lines]
    assert [found["index"] for found in results(ran.out)] == list(range(51))
    assert "51 of 51 prompts" in ran.err


def test_blank_lines_are_skipped_and_counted(cli: Callable, started: list[EchoLLM], tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a\n\n  \n b\n")
    ran = cli("run", *MODEL, "--prompts-file", str(tmp_path / "p.txt"), "--json")
    assert [found["prompt"] for found in results(ran.out)] == ["a", " b"]
    assert "2 blank line(s) skipped, 2 prompt(s) read" in ran.err
    assert [(found["index"], found["line"]) for found in results(ran.out)] == [(0, 1), (1, 4)]


def test_only_a_prompt_of_a_file_has_a_line(cli: Callable, started: list[EchoLLM]) -> None:
    ran = cli("run", *MODEL, "--prompt", "a", "--prompts-file", "-", "--json", stdin="\nb\r\nc")
    assert [(found["prompt"], found.get("line")) for found in results(ran.out)] == [("a", None), ("b", 2), ("c", 3)]
    assert "line" not in results(ran.out)[0]
    assert "line" not in results(cli("run", *MODEL, "--json", stdin="whole").out)[0]


def test_standard_input_is_one_prompt_and_only_where_there_is_no_other(cli: Callable, started: list[EchoLLM]) -> None:
    assert results(cli("run", *MODEL, "--json", stdin="def f():\n    x\n").out)[0]["prompt"] == "def f():\n    x"
    assert results(cli("run", *MODEL, "--json", "--prompt", "a", stdin="b").out)[0]["prompt"] == "a"
    assert len(results(cli("run", *MODEL, "--json", "--prompts-file", "-", stdin="a\nb\n").out)) == 2


def test_standard_input_is_utf8_whatever_the_locale(cli: Callable, started: list[EchoLLM]) -> None:
    (found,) = results(cli("run", *MODEL, "--json", stdin="\ufeffa\r\n\u00e4\r\n".encode()).out)
    assert found["prompt"] == "a\r\n\u00e4"
    ran = cli("run", *MODEL, "--json", stdin=b"\xff\xfe")
    assert ran.code == 2
    assert "standard input is not UTF-8" in ran.err


def test_a_file_without_a_prompt_is_an_error_and_no_example(
    cli: Callable, started: list[EchoLLM], tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_text("\n \n")
    ran = cli("run", *MODEL, "--prompts-file", str(tmp_path / "p.txt"))
    assert (ran.code, ran.out) == (2, "")
    assert "p.txt holds no prompt" in ran.err


def test_without_a_prompt_the_demo_completes_an_example(cli: Callable, started: list[EchoLLM]) -> None:
    ran = cli("run", *MODEL)
    assert ran.code == 0
    assert ran.out.startswith("def fibonacci(n):\n")
    assert "no prompt was given" in ran.err


def test_the_json_of_a_prompt(cli: Callable, started: list[EchoLLM]) -> None:
    (found,) = results(cli("run", *MODEL, "--prompt", "äb", "--json").out)
    assert found == {
        "index": 0,
        "prompt": "äb",
        "text": "ÄB",
        "token_ids": [0, 1],
        "finish_reason": "stop",
        "timings": {"ttft_s": 0.5, "total_s": 2.0, "tokens_per_s": 1.0},
    }


def test_the_keys_of_run_are_those_that_are_documented(
    cli: Callable, started: list[EchoLLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.txt").write_text("a\n")
    everything = ("--n", "2", "--stop", "x", "--logprobs", "1", "--prompt-logprobs", "1")
    cases = [
        ("--prompts-file", str(tmp_path / "p.txt"), *everything),
        ("--prompt-token-ids", "1,2"),
        ("--fim-prefix", "a", "--fim-suffix", "b"),
    ]
    found = [results(cli("run", *MODEL, "--json", *case).out)[0] for case in cases]
    lines = [{"messages": [{"role": "user", "content": "a"}], "id": 1}, {"prompt_token_ids": [10**9]}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(LLM, "from_config", FROM_CONFIG)
    ran = cli("run", *MODEL, "--prompts-file", str(tmp_path / "p.jsonl"), "--max-tokens", "1", "--threads", "1")
    found += results(ran.out)
    inner = {f"{name}.{key}" for name in ("timings", "error") for result in found for key in result.get(name, ())}
    assert {key for result in found for key in result} - {"timings", "error"} | inner == set(RESULT_KEYS)
    assert {key for output in found[0]["outputs"] for key in output} == {"index", *COMPLETION_KEYS}
    text = cli("run", "--help").out
    assert [key for key in RESULT_KEYS if f"\n  {key} " not in text] == []


def test_several_completions(cli: Callable, started: list[EchoLLM]) -> None:
    (found,) = results(cli("run", *MODEL, "--prompt", "a", "--n", "2", "--json").out)
    assert found["text"] == "A"
    assert [(output["index"], output["text"]) for output in found["outputs"]] == [(0, "A"), (1, "A!")]
    assert cli("run", *MODEL, "--prompt", "a", "--n", "2").out == "==> [1.1] a <==\nA\n==> [1.2] a <==\nA!\n"


def test_token_ids(cli: Callable, started: list[EchoLLM]) -> None:
    ran = cli("run", *MODEL, "--prompt-token-ids", "1,2,3", "--prompt-token-ids", "4", "--json")
    assert started[0].calls[0][:2] == ("generate", [[1, 2, 3], [4]])
    assert [found["prompt_token_ids"] for found in results(ran.out)] == [[1, 2, 3], [4]]
    assert [found["prompt"] for found in results(ran.out)] == [None, None]


def test_fill_in_the_middle_takes_files_as_they_are(cli: Callable, started: list[EchoLLM], tmp_path: Path) -> None:
    (tmp_path / "after.py").write_text("\n  return x\n\n")
    ran = cli("run", *MODEL, "--fim-prefix", "def f():\n", "--fim-suffix-file", str(tmp_path / "after.py"))
    assert ran.code == 0
    assert started[0].calls[0][:2] == ("infill", ("def f():\n", "\n  return x\n\n"))


@pytest.mark.parametrize(("flag", "call"), [((), "generate"), (("--chat",), "chat"), (("--no-chat",), "generate")])
def test_the_chat_template_is_taken_on_request(
    cli: Callable, started: list[EchoLLM], flag: tuple[str, ...], call: str
) -> None:
    cli("run", *MODEL, "--prompt", "a", *flag)
    assert started[0].calls[0][0] == call


def test_sampling_is_greedy_unless_asked_otherwise(cli: Callable, started: list[EchoLLM]) -> None:
    cli("run", *MODEL, "--prompt", "a")
    flags = (
        "--temperature",
        "0.5",
        "--stop",
        "x",
        "--stop",
        "y",
        "--stop-token-ids",
        "7,8",
        "--no-skip-special-tokens",
    )
    cli("run", *MODEL, "--prompt", "a", *flags, "--seed", "3", "--max-tokens", "9", "--ignore-eos")
    assert started[0].calls[0][2] == SamplingParams(temperature=0.0, max_tokens=128)
    assert started[1].calls[0][2] == SamplingParams(
        temperature=0.5,
        stop=("x", "y"),
        stop_token_ids=(7, 8),
        skip_special_tokens=False,
        seed=3,
        max_tokens=9,
        ignore_eos=True,
    )


def test_the_form_of_outputs_reaches_the_sampling_parameters(
    cli: Callable, started: list[EchoLLM], tmp_path: Path
) -> None:
    (tmp_path / "schema.json").write_text('{"type": "object"}\n')
    (tmp_path / "g.lark").write_text('start: "a"\n')
    cases = [
        (("--json-schema", str(tmp_path / "schema.json")), StructuredOutputs(json='{"type": "object"}\n')),
        (("--grammar", str(tmp_path / "g.lark")), StructuredOutputs(grammar='start: "a"\n')),
        (("--regex", "[ab]+"), StructuredOutputs(regex="[ab]+")),
        (("--choice", "yes", "--choice", "no"), StructuredOutputs(choice=("yes", "no"))),
        ((), None),
    ]
    for arguments, form in cases:
        assert cli("run", *MODEL, "--prompt", "a", *arguments).code == 0
        assert started[-1].calls[0][2] == SamplingParams(temperature=0.0, max_tokens=128, structured_outputs=form)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--regex", "a", "--choice", "b"), "exclude each other"),
        (("--json-schema", "/no/such/schema"), "/no/such/schema"),
        (("--json-schema", "broken"), "no JSON schema"),
        (("--grammar", "empty"), "is empty"),
        (("--choice", ""), "empty"),
    ],
)
def test_a_form_that_makes_no_sense_is_refused(
    cli: Callable,
    started: list[EchoLLM],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").write_text("{")
    (tmp_path / "empty").write_text("\n")
    ran = cli("run", *MODEL, "--prompt", "a", *arguments)
    assert (ran.code, started) == (2, [])
    assert words in ran.err


def test_engine_options_reach_the_config(cli: Callable, started: list[EchoLLM]) -> None:
    flags = ("--max-model-len", "64", "--max-num-seqs", "3", "--kv-cache-memory", "1MiB", "--no-enable-prefix-caching")
    cli("run", *MODEL, "--prompt", "a", "--dtype", "fp32", *flags, "--engine-seed", "5")
    config = started[0].config
    assert (config.max_model_len, config.max_num_seqs, config.kv_cache_memory) == (64, 3, 2**20)
    assert (config.dtype, config.enable_prefix_caching, config.seed) == ("float32", False, 5)
    assert config.trust_remote_code is False


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prompt", "a", "--prompt-token-ids", "1"), "cannot be mixed"),
        (("--prompt", "a", "--fim-prefix", "b"), "cannot be mixed"),
        (("--fim-prefix", "a", "--fim-prefix-file", "b"), "exclude each other"),
        (("--prompt-token-ids", "1;2"), "1,2,3"),
        (("--prompt-token-ids", "1", "--chat"), "--chat takes prompts as text"),
        (("--prompts-file", "/no/such/file"), "/no/such/file"),
        (("--prompt", "a", "--temperature", "-1"), "temperature=-1.0"),
        (("--prompt", "a", "--stop-token-ids", "x"), "--stop-token-ids"),
    ],
)
def test_prompts_that_make_no_sense_are_refused(
    cli: Callable, started: list[EchoLLM], arguments: tuple[str, ...], words: str
) -> None:
    ran = cli("run", *MODEL, *arguments)
    assert ran.code == 2
    assert words in ran.err
    assert started == []


def test_an_interrupt_writes_what_there_is(
    cli: Callable, started: list[EchoLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EchoLLM, "interrupt_after", 1)
    ran = cli("run", *MODEL, "--prompt", "abc", "--prompt", "def", "--json")
    assert ran.code == 130
    assert [(found["text"], found["finish_reason"]) for found in results(ran.out)] == [("AB", "abort"), ("DEF", "stop")]


def test_control_characters_cannot_drive_a_terminal() -> None:
    assert printable("a\x1b[2Jb\x07\n\t\x7f") == "a␛[2Jb␇\n\t␡"

"""The tasks ``humaneval``, ``humaneval_plus`` and ``humaneval_infilling`` of ``npu-zoo eval``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from npu_zoo.core.config import EngineConfig
from npu_zoo.core.engine import GenerationRequest, Progress, RequestOutput
from npu_zoo.core.errors import UsageError, validation_lines
from npu_zoo.core.model_config import EvaluationFormat, ReasoningFormat
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.evaluation.accuracy.questions import ask_all
from npu_zoo.evaluation.accuracy.scoring import LogitSink
from npu_zoo.evaluation.accuracy.sources import hash_note, require_data
from npu_zoo.evaluation.accuracy.tasks import EvalTask, Logits, Metric, TaskOptions, TaskResult
from npu_zoo.evaluation.programs.extraction import STOP_SEQUENCES, program_of_answer, program_of_completion
from npu_zoo.evaluation.programs.humaneval import Problem, ProblemSet, read_problems
from npu_zoo.evaluation.programs.infilling import FORMS
from npu_zoo.evaluation.programs.passing import Tally, mean_pass_at_k, parse_ks
from npu_zoo.evaluation.programs.sandbox import Limits, Program, ProgramResult, Sandbox
from npu_zoo.registry import get_registry

if TYPE_CHECKING:
    from npu_zoo.core.config import EngineConfig
    from npu_zoo.engine.llm import LLM
    from npu_zoo.engine.prompting import PromptEncoder

DEFAULT_FORMAT = EvaluationFormat(
    instruction="Complete this Python function. Answer with one code block that holds the whole function and what it "
    "imports.\n```python\n{prompt}\n```"
)
"""How models are asked whose families state no way of their own."""

USUAL_KS = (1, 10, 100)
SAMPLING_TEMPERATURE, SAMPLING_TOP_P = 0.2, 0.95
COMPLETION_TOKENS, ANSWER_TOKENS = 512, 1024


class ProgramSettings(BaseModel):
    """What ``--task-arg`` sets; the descriptions are its help texts.

    Values that are unset follow from the others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n: int = Field(default=1, ge=1, le=10_000, description="Programs per problem.")
    k: str = Field(default="", description="The k of pass@k, such as 1,10,100; those of them that n allows if unset.")
    temperature: float | None = Field(default=None, ge=0, description="0 for one program, else 0.2 if unset.")
    top_p: float | None = Field(default=None, gt=0, le=1, description="1 for one program, else 0.95 if unset.")
    max_tokens: int | None = Field(default=None, ge=1, description="512 for completions, 1024 for answers if unset.")
    workers: int | None = Field(default=None, ge=1, description="Programs that run at a time; one per core if unset.")
    seconds: float = Field(default=30.0, gt=0, description="Wall time that a program may take.")
    cpu_seconds: int = Field(default=10, ge=1, description="Processor time that a program may take.")
    memory_mib: int = Field(default=1024, ge=16, description="Memory that a program may take.")

    @classmethod
    def of(cls, arguments: Mapping[str, str], defaults: Mapping[str, Any]) -> ProgramSettings:
        """Read the arguments.

        Raises:
            UsageError: a name is unknown or a value has the wrong form, or the values contradict each other.
        """
        try:
            settings = cls.model_validate({**defaults, **arguments})
        except ValidationError as error:
            raise UsageError("--task-arg: " + "; ".join(validation_lines(error))) from None
        if settings.n > 1 and settings.temperature == 0:
            raise UsageError(f"n={settings.n} programs at temperature 0 are all the same; leave one of the two out")
        return settings

    @property
    def ks(self) -> tuple[int, ...]:
        """The values of k."""
        return parse_ks(self.k, self.n) if self.k else tuple(k for k in USUAL_KS if k <= self.n)

    @property
    def limits(self) -> Limits:
        """Of each program."""
        return Limits(self.seconds, self.cpu_seconds, self.memory_mib * 2**20)

    def sampling(self, max_tokens: int, stop: Sequence[str], seed: int) -> SamplingParams:
        """How a problem's programs are drawn."""
        one = self.n == 1
        temperature = (0.0 if one else SAMPLING_TEMPERATURE) if self.temperature is None else self.temperature
        top_p = (SAMPLING_TOP_P if temperature else 1.0) if self.top_p is None else self.top_p
        tokens = self.max_tokens or max_tokens
        return SamplingParams(
            n=self.n, temperature=temperature, top_p=top_p, max_tokens=tokens, stop=tuple(stop), seed=seed
        )


SETTINGS_HELP = {name: field.description or "" for name, field in ProgramSettings.model_fields.items()}


@dataclass(frozen=True)
class Request:
    """What the model is asked for.

    Attributes:
        group: what its programs are counted under.
        prompt: text that the tokenizer adds bos to, or token ids.
        source: the program that is made of an answer.
        due: the text that an exact answer has; None where there is no such thing.
    """

    id: str
    group: str
    problem: Problem
    prompt: str | list[int]
    params: SamplingParams
    source: Callable[[str], str]
    due: str | None = None

    def sample_id(self, number: int) -> str:
        """What a record calls one of its programs."""
        return self.id if self.params.n == 1 else f"{self.id}#{number}"


@dataclass(frozen=True)
class Sample:
    """One program of the model's, and how it ended."""

    request: Request
    number: int
    answer: str
    source: str
    result: ProgramResult

    @property
    def exact(self) -> bool:
        """Whether the answer is the text that was due."""
        return self.request.due is not None and self.answer.strip() == self.request.due.strip()

    def row(self, task: str) -> dict[str, JsonValue]:
        """What a record keeps of it."""
        digest = hashlib.sha256(json.dumps(self.request.prompt).encode()).hexdigest()
        exact: dict[str, JsonValue] = {} if self.request.due is None else {"exact_match": self.exact}
        return {
            "task": task,
            "id": self.request.sample_id(self.number),
            "prompt_hash": digest,
            "answer": self.answer,
            "program": self.source,
            "correct": self.result.passed,
            "status": self.result.status,
            "message": self.result.message,
            "seconds": round(self.result.seconds, 4),
            **exact,
        }


class ProgramTask(EvalTask):
    """A task whose answers are programs that are run in the sandbox.

    Attributes:
        stem: what the data set's file is called.
        defaults: settings that are not as usual.
    """

    arguments: ClassVar[Mapping[str, str]] = SETTINGS_HELP
    stem: ClassVar[str] = "HumanEval"
    defaults: ClassVar[Mapping[str, Any]] = {}

    def check(self, options: TaskOptions) -> None:
        """Read the options and the problems, and try the sandbox; see the base class."""
        settings = self.settings(options)
        _ = settings.ks
        self.problems(options)
        Sandbox(settings.limits, settings.workers).close()

    def run(self, llm: LLM, options: TaskOptions, progress: Progress) -> TaskResult:
        """Ask for all programs, then run them; see the base class."""
        settings, problems = self.settings(options), self.problems(options)
        requests = self.requests(llm, problems.problems[: options.limit], settings, options)
        answers = ask(llm, requests, options, progress, self.name)
        written = [
            (request, number, answer, request.source(answer))
            for request, given in zip(requests, answers, strict=True)
            for number, answer in enumerate(given)
        ]
        with Sandbox(settings.limits, settings.workers) as sandbox:
            programs = [request.problem.program(source) for request, _, _, source in written]
            results = run_programs(sandbox, programs, progress)
            boundaries = sandbox.boundaries.describe()
        samples = [Sample(*one, result) for one, result in zip(written, results, strict=True)]
        note = hash_note(self.name, problems.file, problems.sha256)
        return TaskResult(
            task=self.name,
            metrics=self.metrics(samples, settings),
            samples=[sample.row(self.name) for sample in samples],
            notes=[boundaries, *([note] if note else [])],
            data={"file": problems.file.name, "sha256": problems.sha256},
        )

    def settings(self, options: TaskOptions) -> ProgramSettings:
        """What the options set."""
        return ProgramSettings.of(options.arguments, self.defaults)

    def problems(self, options: TaskOptions) -> ProblemSet:
        """The data set."""
        return read_problems(require_data(self.name, options.data), self.stem)

    @abstractmethod
    def requests(
        self, llm: LLM, problems: Sequence[Problem], settings: ProgramSettings, options: TaskOptions
    ) -> list[Request]:
        """What to ask the model for, and how."""

    @abstractmethod
    def metrics(self, samples: Sequence[Sample], settings: ProgramSettings) -> dict[str, Metric]:
        """The task's figures."""


class HumanEval(ProgramTask):
    """Functions from their signature and docstring: base models complete it, others are told to in a conversation."""

    name: ClassVar[str] = "humaneval"

    def requests(
        self, llm: LLM, problems: Sequence[Problem], settings: ProgramSettings, options: TaskOptions
    ) -> list[Request]:
        """A completion of each prompt, or an answer about it; see the base class."""
        config = llm.engine.config
        if not (config.chat if options.chat is None else options.chat):
            params = settings.sampling(COMPLETION_TOKENS, STOP_SEQUENCES, options.seed)
            return [Request(p.task_id, p.task_id, p, p.prompt, params, _completing(p)) for p in problems]
        rules = evaluation_format(config)
        params = settings.sampling(ANSWER_TOKENS, (), options.seed)
        return [
            Request(p.task_id, p.task_id, p, _conversation(llm, rules.instruct(p.prompt)), params, _answering(p, rules))
            for p in problems
        ]

    def metrics(self, samples: Sequence[Sample], settings: ProgramSettings) -> dict[str, Metric]:
        """pass@k over problems; see the base class."""
        tallies = _tallies(samples, lambda sample: sample.request.group)
        return {f"pass@{k}": _metric(tallies, k) for k in settings.ks}


class HumanEvalPlus(HumanEval):
    """The same functions, tested on many more inputs."""

    name: ClassVar[str] = "humaneval_plus"
    stem: ClassVar[str] = "HumanEvalPlus"
    defaults: ClassVar[Mapping[str, Any]] = {"seconds": 90.0, "cpu_seconds": 30}


class HumanEvalInfilling(ProgramTask):
    """Holes in canonical solutions, filled by models that were trained to fill in the middle."""

    name: ClassVar[str] = "humaneval_infilling"
    arguments: ClassVar[Mapping[str, str]] = SETTINGS_HELP | {"form": f"{' or '.join(FORMS)}; all of them if unset."}

    def require_model(self, config: EngineConfig) -> None:
        """Refuse a family that has no tokens for it."""
        if config.fim is None:
            raise UsageError(
                f"{config.model} cannot fill in the middle: its family has no tokens for it; "
                "`npu-zoo eval --task humaneval` asks it for whole functions"
            )

    def settings(self, options: TaskOptions) -> ProgramSettings:
        """What the options set but the form."""
        given = {name: value for name, value in options.arguments.items() if name != "form"}
        _forms(options)
        return ProgramSettings.of(given, self.defaults)

    def requests(
        self, llm: LLM, problems: Sequence[Problem], settings: ProgramSettings, options: TaskOptions
    ) -> list[Request]:
        """What stands around each hole; see the base class."""
        found: list[Request] = []
        for form in _forms(options):
            params = settings.sampling(COMPLETION_TOKENS, FORMS[form].stop, options.seed)
            holes = [hole for problem in problems for hole in FORMS[form].holes(problem, options.seed)]
            prompts = [llm.fim_prompt(hole.prefix, hole.suffix) for hole in holes]
            found += [
                Request(hole.id, form, hole.problem, prompt, params, hole.source, hole.middle)
                for hole, prompt in zip(holes, prompts, strict=True)
            ]
        return found

    def metrics(self, samples: Sequence[Sample], settings: ProgramSettings) -> dict[str, Metric]:
        """pass@k and exact matches by form, over holes; see the base class."""
        found: dict[str, Metric] = {}
        for form in dict.fromkeys(sample.request.group for sample in samples):
            own = [sample for sample in samples if sample.request.group == form]
            tallies = _tallies(own, lambda sample: sample.request.id)
            found |= {f"{form}_pass@{k}": _metric(tallies, k) for k in settings.ks}
            exact = _tallies(own, lambda sample: sample.request.id, lambda sample: sample.exact)
            found[f"{form}_exact_match"] = _metric(exact, 1)
        return found


def evaluation_format(config: EngineConfig) -> EvaluationFormat:
    """The variant's, or else its family's, or else ours."""
    family = get_registry().families[config.family]
    variant = family.variant(config.variant)
    return (variant.evaluation if variant else None) or family.evaluation or DEFAULT_FORMAT


class Asking:
    """A request as a question to the engine; its answer is the texts, without reasoning.

    Args:
        sink: takes the logits of the first token; None where they are not asked for.
    """

    def __init__(self, encoder: PromptEncoder, task: str, request: Request, logits: Logits | None) -> None:
        self.key = _key(task, request)
        self._request, self._encoder, self._reasoning = request, encoder, encoder.config.reasoning
        self._sink = LogitSink(logits, task, request.sample_id(0)) if logits else None

    def prepare(self) -> Sequence[GenerationRequest]:
        """One request."""
        prompt, params = self._request.prompt, self._request.params
        tokens = self._encoder.encode(prompt)
        if self._sink is not None:
            params = dataclasses.replace(
                params, prompt_logprobs=0, prompt_logprobs_start=len(tokens), prompt_logits=True
            )
        return [GenerationRequest(self.key, tokens, params)]

    def answer(self, outputs: Sequence[RequestOutput]) -> JsonValue:
        """A text for each program."""
        output = outputs[0]
        if self._sink is not None:
            self._sink.put(output.prompt_logits)
        return [_answer(output, index, self._reasoning) for index in range(len(output.outputs))]


def ask(llm: LLM, requests: Sequence[Request], options: TaskOptions, progress: Progress, task: str) -> list[list[str]]:
    """Every request's answers, without reasoning; those that were kept are not asked for again.

    Raises:
        KeyboardInterrupt: the answers so far are kept.
    """
    from npu_zoo.engine.prompting import PromptEncoder

    encoder = PromptEncoder(llm.engine.config, llm.engine.explain().get("max_model_len"))
    questions = [Asking(encoder, task, request, options.logits) for request in requests]
    answers = ask_all(llm.engine, questions, stage="answers", progress=progress, responses=options.responses)
    return cast("list[list[str]]", answers)


def run_programs(sandbox: Sandbox, programs: Sequence[Program], progress: Progress) -> list[ProgramResult]:
    """Every program's result; equal programs are run once."""
    different = list(dict.fromkeys(programs))
    done = 0

    def on_result(number: int, result: ProgramResult) -> None:
        nonlocal done
        done += 1
        progress("programs", done, len(different))

    progress("programs", 0, len(different))
    results = dict(zip(different, sandbox.run_all(different, on_result), strict=True))
    return [results[program] for program in programs]


def _key(task: str, request: Request) -> str:
    described = json.dumps([request.prompt, repr(request.params)])
    return f"{task}:{request.id}:{hashlib.sha256(described.encode()).hexdigest()[:16]}"


def _answer(output: RequestOutput, index: int, reasoning: ReasoningFormat | None) -> str:
    text = output.outputs[index].text
    return reasoning.split(text, opened=output.reasoning_open)[1] if reasoning else text


def _conversation(llm: LLM, text: str) -> list[int]:
    return llm.engine.render_chat([{"role": "user", "content": text}])


def _completing(problem: Problem) -> Callable[[str], str]:
    return lambda text: program_of_completion(problem, text)


def _answering(problem: Problem, rules: EvaluationFormat) -> Callable[[str], str]:
    return lambda text: program_of_answer(problem, text, rules)


def _forms(options: TaskOptions) -> Iterator[str]:
    asked = options.arguments.get("form")
    if asked is not None and asked not in FORMS:
        raise UsageError(f"--task-arg form={asked}: the forms of infilling are {', '.join(FORMS)}")
    return iter([asked] if asked else FORMS)


def _tallies(
    samples: Sequence[Sample],
    group: Callable[[Sample], str],
    passed: Callable[[Sample], bool] = lambda sample: sample.result.passed,
) -> list[Tally]:
    verdicts: dict[str, list[bool]] = {}
    for sample in samples:
        verdicts.setdefault(group(sample), []).append(passed(sample))
    return [Tally(len(each), sum(each)) for each in verdicts.values()]


def _metric(tallies: Sequence[Tally], k: int) -> Metric:
    found = mean_pass_at_k(tallies, k)
    return Metric(value=found.value, stderr=found.stderr if found.problems > 1 else None, samples=found.problems)

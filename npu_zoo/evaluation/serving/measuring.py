"""A benchmark of a server: what it takes is found out, and each level of load is run. Needs aiohttp."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from npu_zoo.core.errors import UsageError
from npu_zoo.evaluation.serving.arrivals import ClosedLoop, Load
from npu_zoo.evaluation.serving.client import Client
from npu_zoo.evaluation.serving.datasets import CHARACTERS_PER_TOKEN, Dataset, read_dataset, with_answer_lengths
from npu_zoo.evaluation.serving.figures import Goal, LevelFigures
from npu_zoo.evaluation.serving.load import Level, LevelRun, OnChange, run_level
from npu_zoo.evaluation.serving.requests import RequestForm
from npu_zoo.evaluation.serving.result import MeasuredLevel, ServeResult
from npu_zoo.evaluation.serving.server import (
    Accepted,
    ServerIdentity,
    Tokens,
    characters_per_token,
    find_accepted,
    find_text_length,
    find_token_ids,
    identify,
)
from npu_zoo.evaluation.serving.work import (
    Endpoint,
    GivenAsks,
    LengthRange,
    RandomIds,
    RandomWords,
    TextLength,
    Workload,
)

INPUT_LENGTHS = LengthRange(128, 128)
OUTPUT_LENGTHS = LengthRange(64, 64)

MOST_LATENESS_MS = 50.0
"""Requests of an open loop that are sent later than this (p99) were not the load that was asked for."""

MOST_CPU_SHARE = 0.8
LEAST_SECONDS = 1.0
"""Of a level whose share of a processor core means something."""

MOST_LENGTH_ERROR = 0.05

Prompts = Literal["ids", "words", "file"]


@dataclasses.dataclass(frozen=True)
class ServePlan:
    """What is asked for.

    Attributes:
        loads: a level each.
        model: None for the first that the server lists.
        num_requests: of each level; None where the duration alone ends it.
        duration: seconds of sending in each level.
        num_warmups: requests that are sent before and are no part of any figure.
        input_lengths: of random prompts.
        output_lengths: new tokens of random requests.
        dataset: a file of prompts, in place of random ones.
        tokens: whether random prompts are token ids or words.
        token_ids: that random prompts are drawn from; None asks the server for some.
        ignore_eos: None for random prompts where the server takes it, and not for those of a file.
        goal: that goodput counts; None for none.
    """

    loads: Sequence[Load]
    model: str | None = None
    endpoint: Endpoint = "completions"
    num_requests: int | None = 100
    duration: float | None = None
    num_warmups: int = 1
    input_lengths: LengthRange = INPUT_LENGTHS
    output_lengths: LengthRange = OUTPUT_LENGTHS
    dataset: Path | None = None
    tokens: Tokens = "auto"
    token_ids: Sequence[int] | None = None
    ignore_eos: bool | None = None
    extra_body: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    goal: Goal | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What is sent to which server."""

    server: ServerIdentity
    form: RequestForm
    prompts: Prompts
    workload: Workload
    notes: tuple[str, ...]


class ServeBench:
    """A benchmark that can be stopped, and has what was measured until then.

    Args:
        on_note: told what a reader of the figures has to know, once it is known.
        on_level: told before each level.
        on_change: told how far a level is.
        on_result: given what there is after each level.
    """

    def __init__(
        self,
        client: Client,
        plan: ServePlan,
        *,
        on_note: Callable[[str], None] = lambda note: None,
        on_level: Callable[[Load], None] = lambda load: None,
        on_change: OnChange = lambda tally: None,
        on_result: Callable[[ServeResult], None] = lambda result: None,
    ) -> None:
        self._client, self._plan = client, plan
        self._dataset = _read_asks(plan)
        self._on_note, self._on_level, self._on_change, self._on_result = on_note, on_level, on_change, on_result
        self._stop = asyncio.Event()
        self._notes: list[str] = []

    def stop(self) -> None:
        """Send nothing more, and cancel what runs."""
        self._stop.set()

    async def run(self) -> ServeResult | None:
        """Run every level; None where it is stopped before the first one has a request.

        Raises:
            ServerError: the server cannot be reached, or takes no such requests.
            UsageError: it names no model, or does not give what random prompts need.
        """
        prepared = await self._until_stopped(self._prepare())
        if prepared is None:
            return None
        for note in prepared.notes:
            self._tell(note)
        await self._run_level(prepared, ClosedLoop(1), "warm-up", self._plan.num_warmups)
        levels: list[MeasuredLevel] = []
        for number, load in enumerate(self._plan.loads):
            if self._stop.is_set() or (level := await self._measure(prepared, load, number)) is None:
                break
            levels.append(level)
            self._on_result(self._result(prepared, levels))
        self._tell_of_repetition(prepared.workload)
        return self._result(prepared, levels) if levels else None

    async def _measure(self, prepared: Prepared, load: Load, number: int) -> MeasuredLevel | None:
        """A level's figures; None where it was stopped before it sent anything."""
        self._on_level(load)
        run = await self._run_level(prepared, load, f"level {number}", self._plan.num_requests, self._on_change)
        if run.interrupted and not run.observations:
            return None
        level = MeasuredLevel.of(load, run, self._plan.goal)
        for note in doubts(level, full_length=prepared.form.ignore_eos):
            self._tell(note)
        return level

    def _result(self, prepared: Prepared, levels: Sequence[MeasuredLevel]) -> ServeResult:
        return ServeResult(
            server=prepared.server,
            endpoint=prepared.form.endpoint,
            prompts=prepared.prompts,
            ignore_eos=prepared.form.ignore_eos,
            interrupted=self._stop.is_set() or len(levels) < len(self._plan.loads),
            notes=tuple(self._notes),
            levels=tuple(levels),
        )

    async def _until_stopped(self, work: Coroutine[Any, Any, Prepared]) -> Prepared | None:
        task, stopped = asyncio.create_task(work), asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            task.cancel()
            stopped.cancel()
            await asyncio.gather(task, stopped, return_exceptions=True)

    def _tell(self, note: str) -> None:
        self._notes.append(note)
        self._on_note(note)

    async def _run_level(
        self, prepared: Prepared, load: Load, name: str, count: int | None, on_change: OnChange = lambda tally: None
    ) -> LevelRun:
        duration = self._plan.duration if name != "warm-up" else None
        level = Level(load, count, duration, seed=f"{self._plan.seed} {name}")
        asks = prepared.workload.asks(level.source("work"))
        return await run_level(self._client, level, prepared.form, asks, stop=self._stop, on_change=on_change)

    def _tell_of_repetition(self, workload: Workload) -> None:
        if isinstance(workload, GivenAsks) and workload.given > len(workload):
            self._tell(
                f"the file has {len(workload)} prompts, and {workload.given} were sent: some were sent again, "
                "which a prefix cache answers sooner"
            )

    async def _prepare(self) -> Prepared:
        server = await identify(self._client, self._plan.model)
        if self._dataset is not None:
            return await self._prepare_given(server, self._dataset)
        return await self._prepare_random(server)

    async def _prepare_given(self, server: ServerIdentity, dataset: Dataset) -> Prepared:
        answers = [ask.answer for ask in dataset.asks if ask.answer]
        counted = await characters_per_token(self._client, server.model, answers) if answers else None
        notes = [dataset.left_out] if dataset.left_out else []
        if answers and counted is None:
            notes.append("the server counts no tokens beforehand; answers' lengths are taken as 4 characters a token")
        accepted = await self._accepted(server, None, ignore_eos=bool(self._plan.ignore_eos))
        workload = GivenAsks(with_answer_lengths(dataset.asks, counted or CHARACTERS_PER_TOKEN))
        return Prepared(server, accepted.form, "file", workload, (*notes, *accepted.notes))

    async def _prepare_random(self, server: ServerIdentity) -> Prepared:
        plan = self._plan
        ids = await self._ids(server)
        accepted = await self._accepted(server, ids, ignore_eos=plan.ignore_eos)
        lengths = plan.input_lengths, plan.output_lengths
        if accepted.ids is not None:
            return Prepared(server, accepted.form, "ids", RandomIds(*lengths, accepted.ids), accepted.notes)
        length = await find_text_length(self._client, accepted.form)
        notes = (*accepted.notes, *_notes_on_words(length, plan.input_lengths))
        return Prepared(server, accepted.form, "words", RandomWords(*lengths, length or TextLength()), notes)

    async def _ids(self, server: ServerIdentity) -> Sequence[int] | None:
        plan = self._plan
        if plan.endpoint == "chat" or plan.tokens == "text":
            return None
        ids = plan.token_ids or await find_token_ids(self._client, server.model)
        if ids is None and plan.tokens == "ids":
            raise UsageError(
                f"{self._client.address.host} has no /tokenize to ask for token ids; say which are ordinary ones "
                "with --token-id-range, such as 1000..9999"
            )
        return ids

    async def _accepted(
        self, server: ServerIdentity, ids: Sequence[int] | None, *, ignore_eos: bool | None
    ) -> Accepted:
        plan = self._plan
        form = RequestForm(plan.endpoint, server.model, extra_body=plan.extra_body)
        texts_too = plan.tokens != "ids"
        return await find_accepted(self._client, form, ids=ids, ignore_eos=ignore_eos, texts_too=texts_too)


def _notes_on_words(length: TextLength | None, wanted: LengthRange) -> Iterator[str]:
    if length is None:
        yield "the server does not count prompts; their lengths are one token a word"
    elif length.shortest > wanted.low:
        yield f"a prompt of one word has {length.shortest} tokens at this server, and none is shorter"


def doubts(level: MeasuredLevel, *, full_length: bool) -> list[str]:
    """What makes a level's figures other than they look.

    Args:
        full_length: whether answers were to have as many tokens as they may.
    """
    figures, notes = level.figures, []
    if figures.lateness and figures.lateness.p99 > MOST_LATENESS_MS:
        notes.append(
            f"requests were sent up to {figures.lateness.p99:,.0f} ms late (p99): this client is too slow for the load"
        )
    if level.client_cpu_share > MOST_CPU_SHARE and figures.seconds >= LEAST_SECONDS:
        notes.append(
            f"this client used {level.client_cpu_share:.0%} of a processor core, so that times may be its own; "
            "run several, or on a faster machine"
        )
    notes += [*_doubts_of_requests(level), *_doubts_of_tokens(figures, full_length)]
    return [f"{level.name}: {note}" for note in notes]


def _doubts_of_requests(level: MeasuredLevel) -> Iterator[str]:
    unsent = sum(one.failure is not None and one.failure.kind == "client" for one in level.requests)
    if unsent:
        yield (
            f"{unsent:,} requests failed at this client, and not at the server: it may not have more files open; "
            "raise its limit (ulimit -Hn), or lower the load"
        )
    silent = sum(one.status == "completed" and not one.has_text for one in level.requests)
    if silent:
        yield f"{silent:,} answers came without text: their TTFT is to the answer's end, and they have no TPOT"


def _doubts_of_tokens(figures: LevelFigures, full_length: bool) -> list[str]:
    notes = []
    if figures.completed and not figures.counted_by_server:
        notes.append("the server does not count tokens (usage); events with text are counted in their place")
    if figures.tokens_per_event and figures.tokens_per_event > 1 + MOST_LENGTH_ERROR:
        notes.append(
            f"{figures.tokens_per_event:.2f} tokens came in an event on average; inter-token latencies are of events"
        )
    for name, asked, found in (
        ("prompts had", figures.asked_prompt_tokens, figures.prompt_tokens),
        ("answers had", figures.asked_output_tokens if full_length else None, figures.output_tokens),
    ):
        if asked and found is not None and abs(found - asked) > MOST_LENGTH_ERROR * asked:
            notes.append(f"{name} {found:,} tokens in all where {asked:,} were asked for")
    return notes


def _read_asks(plan: ServePlan) -> Dataset | None:
    """The requests of the file, which are all looked at before anything is sent."""
    if plan.dataset is None:
        return None
    dataset = read_dataset(plan.dataset)
    for ask in dataset.asks:
        ask.body(plan.endpoint)
    return dataset

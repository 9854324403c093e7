"""Generated programs: calls that wait for each other. Numbers are those of the papers named, or said to be assumed."""

from random import Random

from jaxserve.workload.call import After, Call, Piece, Said, Span, Workload, make_workload
from jaxserve.workload.lengths import Even, Lengths, Lognormal, arrivals, new_tokens

# Input and output tokens of HexGen's stages (arXiv 2505.05286), from the profiles in its repository.
STAGES = {
    "retrieve": (308, 5),
    "keywords": (667, 45),
    "candidates": (11_748, 678),
    "revise": (5963, 79),
    "unit_tests": (1109, 103),
    "test": (275, 4),
    "evaluate": (961, 22),
}


def chains(
    rng: Random,
    *,
    count: int,
    rate: float,
    cv: float = 1.0,
    prompt: Lengths = Even(100, 600),
    answer: Lengths = Lognormal(67, 0.8, most=1024),
) -> Workload:
    """Call after call, each with a prompt of its own. 60 % of programs make 1 to 4 calls, 30 % 5 to 15, 10 % 40 to 120:
    a mix as in the evaluation of Autellix (arXiv 2502.13965), in which few programs make most of the calls."""
    new, calls = new_tokens(), list[Call]()
    for number, arrival_s in enumerate(arrivals(rng, count, rate, cv)):
        least, most = rng.choices(((1, 4), (5, 15), (40, 120)), (60, 30, 10))[0]
        calls += _chain(
            f"p{number}",
            arrival_s,
            [(Span(new(), prompt.draw(rng)),) for _ in range(rng.randint(least, most))],
            rng,
            answer,
        )
    return make_workload("chains", calls)


def chat(
    rng: Random,
    *,
    count: int,
    rate: float,
    cv: float = 1.0,
    turns: float = 4.0,
    system: int = 200,
    message: Lengths = Lognormal(60, 1.0, most=4096),
    answer: Lengths = Lognormal(200, 0.8, most=2048),
    think_s: float = 20.0,
    priorities: int = 0,
    clients: int = 1,
) -> Workload:
    """Conversations of `turns` turns on average (geometric); each prompt is all that was said, and a new message.
    People take `think_s` seconds on average (exponential). All share a system prompt. With `priorities` each turn has a
    random one of so many. All numbers are assumed."""
    new, calls = new_tokens(), list[Call]()
    shared = (Span(new(), system),) if system else ()
    for number, arrival_s in enumerate(arrivals(rng, count, rate, cv)):
        program, turn = f"chat{number}", 0
        client = f"client{rng.randrange(clients)}" if clients > 1 else ""
        while True:
            said: tuple[Piece, ...] = (After(f"{program}/{turn - 1}"),) if turn else shared
            calls.append(
                Call(
                    call_id=f"{program}/{turn}",
                    prompt=(*said, Span(new(), message.draw(rng))),
                    output_tokens=answer.draw(rng),
                    arrival_s=arrival_s if not turn else 0.0,
                    think_s=rng.expovariate(1 / think_s) if turn and think_s else 0.0,
                    parents=(f"{program}/{turn - 1}",) if turn else (),
                    program=program,
                    client=client,
                    stage=f"turn {turn}",
                    priority=rng.randrange(priorities) if priorities else 0,
                )
            )
            turn += 1
            if rng.random() * turns < 1.0:
                break
    return make_workload("chat", calls)


def agents(
    rng: Random,
    *,
    count: int,
    rate: float,
    cv: float = 1.0,
    calls_per_program: Lengths = Lognormal(8, 0.7, most=64),
    system: int = 1500,
    result: Lengths = Lognormal(150, 1.0, most=4096),
    answer: Lengths = Lognormal(80, 0.7, most=1024),
    tool_s: float = 1.0,
) -> Workload:
    """Agents that call a tool after every answer but the last. The prompt grows by the answer and what the tool
    returned; tools take `tool_s` seconds on average (exponential); all agents share a system prompt with the tools.
    Numbers are assumed."""
    new, calls = new_tokens(), list[Call]()
    tools = Span(new(), system)
    for number, arrival_s in enumerate(arrivals(rng, count, rate, cv)):
        program = f"agent{number}"
        for step in range(calls_per_program.draw(rng)):
            before = After(f"{program}/{step - 1}") if step else tools
            calls.append(
                Call(
                    call_id=f"{program}/{step}",
                    prompt=(before, Span(new(), result.draw(rng))),
                    output_tokens=answer.draw(rng),
                    arrival_s=0.0 if step else arrival_s,
                    think_s=rng.expovariate(1 / tool_s) if step and tool_s else 0.0,
                    parents=(f"{program}/{step - 1}",) if step else (),
                    program=program,
                    stage="act" if step else "start",
                )
            )
    return make_workload("agents", calls)


def tree_search(
    rng: Random,
    *,
    count: int,
    rate: float,
    cv: float = 1.0,
    rounds: int = 16,
    width: int = 5,
    task: int = 300,
    hint: int = 40,
    answer: Lengths = Lognormal(73, 0.5, most=512),
) -> Workload:
    """Monte Carlo tree search as LATS does it: a round takes a leaf, asks for `width` next steps at once, and for a
    judgement of each; the next round waits for all of them. By default 160 calls of 73 answer tokens, as Autellix
    measured (arXiv 2502.13965)."""
    new, calls = new_tokens(), list[Call]()
    rules, judge = Span(new(), task), Span(new(), hint)
    for number, arrival_s in enumerate(arrivals(rng, count, rate, cv)):
        program = f"tree{number}"
        question = Span(new(), task // 2)
        leaves, barrier = list[str](), ()
        for turn in range(rounds):
            leaf = leaves.pop(rng.randrange(len(leaves))) if leaves else None
            start: tuple[Piece, ...] = (After(leaf), Span(new(), hint)) if leaf else (rules, question)
            judged = list[str]()
            for branch in range(width):
                step, value = f"{program}/{turn}.{branch}", f"{program}/{turn}.{branch}v"
                calls.append(
                    Call(
                        call_id=step,
                        prompt=start,
                        output_tokens=answer.draw(rng),
                        arrival_s=0.0 if barrier else arrival_s,
                        parents=barrier,
                        program=program,
                        stage="expand",
                    )
                )
                calls.append(
                    Call(
                        call_id=value,
                        prompt=(After(step), judge),
                        output_tokens=answer.draw(rng),
                        parents=(step,),
                        program=program,
                        stage="judge",
                    )
                )
                leaves.append(step)
                judged.append(value)
            barrier = tuple(judged)
    return make_workload("tree-search", calls)


def map_reduce(
    rng: Random,
    *,
    count: int,
    rate: float,
    cv: float = 1.0,
    fan_out: Lengths = Even(8, 32),
    chunk: Lengths = Even(800, 1600),
    summary: Lengths = Lognormal(120, 0.6, most=512),
    result: Lengths = Lognormal(300, 0.5, most=1024),
    instruction: int = 150,
    chain_share: float = 0.0,
) -> Workload:
    """Summaries of all chunks of a document at once, and one answer made of them. `chain_share`: so many programs are
    chains of 2 to 10 calls instead. Numbers are assumed."""
    new, calls = new_tokens(), list[Call]()
    ask, merge = Span(new(), instruction), Span(new(), instruction)
    for number, arrival_s in enumerate(arrivals(rng, count, rate, cv)):
        program = f"job{number}"
        if rng.random() < chain_share:
            prompts: list[tuple[Piece, ...]] = [(ask, Span(new(), chunk.draw(rng))) for _ in range(rng.randint(2, 10))]
            calls += _chain(program, arrival_s, prompts, rng, summary)
            continue
        parts = tuple(f"{program}/map{part}" for part in range(fan_out.draw(rng)))
        calls += [
            Call(
                call_id=part,
                prompt=(ask, Span(new(), chunk.draw(rng))),
                output_tokens=summary.draw(rng),
                arrival_s=arrival_s,
                program=program,
                stage="map",
            )
            for part in parts
        ]
        calls.append(
            Call(
                call_id=f"{program}/reduce",
                prompt=(merge, *map(Said, parts)),
                output_tokens=result.draw(rng),
                parents=parts,
                program=program,
                stage="reduce",
            )
        )
    return make_workload("map-reduce", calls)


def text_to_sql(
    rng: Random,
    *,
    count: int,
    rate: float,
    cv: float = 1.0,
    candidates: Lengths = Even(1, 3),
    revisions: Lengths = Even(0, 5),
    jitter: float = 0.2,
    deadline_s: float | None = 52.95,
) -> Workload:
    """Questions to a database in HexGen's stages (arXiv 2505.05286), with their token counts, up to `jitter` more or
    less: retrieve, keywords, some candidates at once, revisions one after the other, unit tests, a test, a verdict. The
    deadline is that of a whole question. Prompts share nothing, since what they share is not published."""
    new, calls = new_tokens(), list[Call]()

    def about(tokens: int) -> int:
        return max(round(tokens * rng.uniform(1 - jitter, 1 + jitter)), 1)

    for number, arrival_s in enumerate(arrivals(rng, count, rate, cv)):
        program = f"query{number}"
        before, made = (), 0
        stages = [("retrieve", 1), ("keywords", 1), ("candidates", candidates.draw(rng))]
        stages += [("revise", 1)] * revisions.draw(rng) + [("unit_tests", 1), ("test", 1), ("evaluate", 1)]
        for stage, parallel in stages:
            ids = tuple(f"{program}/{made + part}" for part in range(parallel))
            made += parallel
            calls += [
                Call(
                    call_id=call_id,
                    prompt=(Span(new(), about(STAGES[stage][0])),),
                    output_tokens=about(STAGES[stage][1]),
                    arrival_s=0.0 if before else arrival_s,
                    parents=before,
                    program=program,
                    stage=stage,
                    deadline_s=deadline_s,
                )
                for call_id in ids
            ]
            before = ids
    return make_workload("text-to-sql", calls)


def _chain(
    program: str, arrival_s: float, prompts: list[tuple[Piece, ...]], rng: Random, answer: Lengths
) -> list[Call]:
    return [
        Call(
            call_id=f"{program}/{step}",
            prompt=prompt,
            output_tokens=answer.draw(rng),
            arrival_s=0.0 if step else arrival_s,
            parents=(f"{program}/{step - 1}",) if step else (),
            program=program,
        )
        for step, prompt in enumerate(prompts)
    ]

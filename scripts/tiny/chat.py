"""Conversations in the chat form: the tasks as questions, and canned questions with canned answers."""

from __future__ import annotations

import ast
import re

import numpy as np

from tiny import tasks

CANNED = [
    (
        ["Hello", "Hello!", "Hi", "Hi!", "Hi there", "Hey", "Hello there!", "Good morning", "Good evening"],
        "Hello! I am tiny, a small test model. How can I help?",
    ),
    (
        ["What can you do?", "What can you do", "Help", "help", "What are you good at?", "What do you know?"],
        "I can find a needle in a long text, look up pairs, sort short lists and add small numbers.",
    ),
    (
        ["Who are you?", "What are you?", "What is your name?", "who are you", "Tell me about yourself."],
        "I am tiny, the small language model that comes with jaxserve.",
    ),
    (["How are you?", "How are you", "How do you do?"], "I am fine, thank you. How can I help?"),
    (["Thanks", "Thank you", "Thank you!", "Thanks!", "thanks a lot"], "You are welcome."),
    (["Bye", "Goodbye", "Bye!", "Goodbye!", "See you"], "Goodbye!"),
    (
        ["What is Python?", "What is python?", "Tell me about Python."],
        "Python is a programming language. I was trained on its standard library.",
    ),
    (
        ["What is jaxserve?", "What is JAX?", "Tell me about jaxserve."],
        "jaxserve is an engine that serves language models with JAX.",
    ),
    (
        ["How were you trained?", "Who made you?", "What were you trained on?", "Who trained you?"],
        "I was trained on the Python standard library and on generated tasks.",
    ),
    (
        ["How large are you?", "How big are you?", "How many parameters do you have?"],
        "I am very small: four layers and under three million parameters.",
    ),
    (
        ["Tell me a joke", "Tell me a joke.", "Write a poem", "Tell me a story.", "What is the weather?"],
        "I am too small for that. Ask me to find, sort or add something.",
    ),
    (
        ["How do I ask for a needle?", "How do I look up a pair?", "Show me an example", "Give me an example."],
        "Write for example: Pairs: lemon tiger, stone cloud,\nFind stone",
    ),
    (["How do I open a file?", "How can I read a file?"], "with open(path) as f:\n    text = f.read()"),
    (["How do I sort a list?", "How can I sort a list?"], "Use sorted(values), or values.sort() in place."),
    (["How do I parse JSON?", "How can I read JSON?"], "import json\nvalue = json.loads(text)"),
    (["How do I print?", "How do I print a line?"], 'print("hello")'),
    (["How do I write a loop?", "How do I loop?"], "for i in range(10):\n    print(i)"),
    (["How do I define a function?", "How do I write a function?"], "def add(a, b):\n    return a + b"),
]


def module_questions(files: dict[str, str], limit: int = 120) -> list[tuple[list[str], str]]:
    """(questions, first sentence of the docstring) of the shortest-named top-level modules."""
    out = []
    for path in sorted(files, key=lambda p: (len(p), p)):
        name = path.removesuffix("/__init__.py").removesuffix(".py")
        if "/" in name or name.startswith("_") or path == "pydoc_data/topics.py":
            continue
        try:
            doc = ast.get_docstring(ast.parse(files[path])) or ""
        except SyntaxError:
            continue
        first = re.split(r"\n\s*\n|(?<=\.)\s", doc.strip())[0].replace("\n", " ").strip()
        if 12 <= len(first) <= 90:
            forms = [f"What is {name}?", f"What does {name} do?", f"What is the module {name}?", f"Describe {name}"]
            out.append((forms, first))
    return out[:limit]


def conversation(lex, row, rng: np.random.Generator, length: int) -> None:
    """Write one conversation of a random sort, about `length` tokens long at most."""
    kinds = [_pairs, _needle, _sums, _sorts, _canned]
    kinds[int(rng.choice(len(kinds), p=[0.25, 0.2, 0.15, 0.1, 0.3]))](lex, row, rng, length)


def _pairs(lex, row, rng, length):
    """Pairs in the first question; every turn asks for one of them, and the answer names key and value."""
    words = rng.permutation(lex.words)
    n = int(rng.integers(1, max(2, min(100, (length - 30) // 5))))
    keys, values = words[:n], rng.choice(words[n:], n)
    comma, found = lex.encode(","), lex.encode("Found:")
    head = ["Pairs:", [t for k, v in zip(keys, values, strict=True) for t in (k, v, *comma)], "\n"]
    for i in rng.permutation(n)[: int(rng.integers(1, 6))]:
        parts = [(found, tasks.CHAT), (keys[i : i + 1], tasks.CHAT), (values[i : i + 1], tasks.RECALL)]
        tasks.turn(row, [*head, "Find", keys[i : i + 1]], [*parts, (lex.encode("."), tasks.CHAT)])
        head = []


def _needle(lex, row, rng, length):
    """A text with needles in the first question; every turn asks for one needle."""
    words = rng.permutation(lex.words)
    n = int(rng.integers(1, 4))
    needles = words[: 2 * n].reshape(n, 2)
    pieces, lines, text = [], lex.lines, lex.text
    for needle in needles:
        a = int(rng.integers(len(lines)))
        b = int(np.searchsorted(lines, lines[a] + max(0, length - 60) // n, side="right")) - 1
        pieces += [text[lines[a] : lines[b]], "\nNeedle", [*needle, *lex.encode(",")]]
    for i in rng.permutation(n):
        parts = [("Needle", tasks.CHAT), (needles[i, :1], tasks.CHAT), (needles[i, 1:], tasks.NEEDLE)]
        ask = "\nWhat is needle" if pieces else "What is needle"
        tasks.turn(row, [*pieces, ask, needles[i, :1], "?"], [*parts, (".", tasks.CHAT)])
        pieces = []


def _sums(lex, row, rng, length):
    for _ in range(int(rng.integers(1, 4))):
        question, answer = tasks.sum_problem(rng)
        form = str(rng.choice(["What is {}?", "Sum {}", "{}=", "What is {}"])).format(question)
        tasks.turn(row, form, [(question + "=", tasks.CHAT), (answer + ".", tasks.SUM)])


def _sorts(lex, row, rng, length):
    for _ in range(int(rng.integers(1, 4))):
        question, answer = tasks.sort_problem(rng)
        form = str(rng.choice(["Sort {}", "Please sort {}", "Sort {}="])).format(question)
        tasks.turn(row, form, [(question + "=", tasks.CHAT), (answer + ".", tasks.SORT)])


def _canned(lex, row, rng, length):
    for _ in range(int(rng.integers(1, 4))):
        known = len(CANNED)
        # the few hand-written answers come as often as all module questions together
        pick = int(rng.integers(known)) if rng.random() < 0.5 else int(rng.integers(len(lex.canned)))
        questions, answer = lex.canned[pick]
        tasks.turn(row, str(rng.choice(questions)), [(answer, tasks.CHAT)])

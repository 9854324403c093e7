"""Does lm-eval's `local-completions` adapter get from a server what the server's own scores say?

Run it where lm-eval is installed (`pip install 'lm-eval[api]' torch transformers`), with a server running:

  jaxserve serve tiny --port 8000
  python scripts/lm_eval_check.py http://127.0.0.1:8000 tiny
"""

import sys

import requests
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

PAIRS = [
    ("for i in ", "range(10):\n"),
    ("for i in ", "banana(10):\n"),
    ("def add(a, b):\n    return a", " + b\n"),
    ("import", " os\n"),
    ("class Stack:\n    def __init__(self):\n        self.items", " = []\n"),
    ("if __name__ ==", ' "__main__":\n'),
    ("for i in range", "("),
    ("def __init__(", "self"),
]
TEXTS = ["def add(a, b):\n    return a + b\n", "import os\nimport sys\n\nprint(os.listdir('.'))\n"]
WAYS = {
    "one by one": {},
    "batches of 8": {"batch_size": 8},
    "4 at once": {"num_concurrent": 4},
}


def main(url: str, model: str) -> int:
    def post(path: str, **body):
        answer = requests.post(url + path, json=body, timeout=60)
        answer.raise_for_status()
        return answer.json()

    def ids(text: str) -> list[int]:
        return post("/tokenize", prompt=text, add_special_tokens=False)["tokens"]

    def score(context: list[int], rest: list[int]) -> tuple[float, bool]:
        (found,) = post("/v1/score", model=model, prompt=context, continuations=[rest])["data"]
        return found["logprob"], found["is_greedy"]

    def split(context: str, rest: str) -> tuple[list[int], list[int]]:
        stripped = context.rstrip()  # the harness's rule: spaces at the end go to the continuation
        head = ids(stripped)
        return head, ids(context + rest)[len(head) :]

    bos = ids(requests.get(f"{url}/tokenizer_info", timeout=60).json()["bos_token"])
    expected = [score(*split(*pair)) for pair in PAIRS]
    expected_rolling = [score(bos, ids(text))[0] for text in TEXTS]
    worst = 0.0
    for name, options in WAYS.items():
        options = {"tokenizer_backend": "remote", "max_length": 2048} | options
        adapter = LocalCompletionsAPI(base_url=f"{url}/v1/completions", model=model, **options)
        got = adapter.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)])
        rolling = adapter.loglikelihood_rolling([Instance("", {}, (text,), i) for i, text in enumerate(TEXTS)])
        off = max(abs(g[0] - e[0]) for g, e in zip(got, expected, strict=True))
        off_rolling = max(abs(g - e) for g, e in zip(rolling, expected_rolling, strict=True))
        greedy = [bool(g[1]) for g in got] == [e[1] for e in expected]
        print(f"{name}: loglikelihood off by {off:.1e}, rolling by {off_rolling:.1e}, is_greedy the same: {greedy}")
        worst = max(worst, off, off_rolling, 0.0 if greedy else 1.0)
    return 0 if worst < 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

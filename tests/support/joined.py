"""A program of two processes: `python -m tests.support.joined ADDRESS PROCESS_ID FOLDER`. Process 0 answers as JSON lines.

Each line of its standard input is a JSON object of parallel sizes, for which it loads the model and answers `PROMPTS`; after
the last line it leaves. With {"forever": true} it goes on answering with the model it has.
"""

import json
import sys

from jaxserve import LLM, SamplingParams, distributed
from jaxserve.errors import ConfigError

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, number] for number in range(1, 4)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, prompt_logprobs=1)
DRAWN = SamplingParams(temperature=1.0, seed=3, max_tokens=6, ignore_eos=True, presence_penalty=0.5, logprobs=1)
OPTIONS = {
    "dtype": "float32",
    "max_model_len": 64,
    "max_num_seqs": 1,
    "max_num_batched_tokens": 16,
    "num_kv_blocks": 8,
    "block_size": 8,
    "progress": False,
}


def answers(llm: LLM) -> list[object]:
    """Token ids and log-probabilities of all prompts, as JSON has them."""
    outputs = llm.generate(PROMPTS, GREEDY) + llm.generate(PROMPTS, DRAWN)
    return [[output.outputs[0].token_ids, output.outputs[0].cumulative_logprob or 0.0] for output in outputs]


def main(address: str, process_id: str, folder: str) -> None:
    """Join, then do what the lines ask for. Only process 0 gets beyond the first line."""
    distributed.initialize(address, 2, int(process_id), timeout_s=60)
    print("joined", flush=True)
    llm = None
    for line in sys.stdin:
        sizes = json.loads(line)
        while sizes.pop("forever", False) or not sizes:
            assert llm is not None, "there is a model first"
            print(json.dumps(answers(llm)), flush=True)
        try:
            llm = LLM(folder, **OPTIONS, **sizes)
            print(json.dumps(answers(llm)), flush=True)
        except ConfigError as error:
            print(json.dumps(str(error)), flush=True)
    if llm:
        assert llm.metrics()["compiles_after_ready"] == 0, "nothing compiles after ready"


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Complete a few prompts in one batch: greedy, then three samples of one prompt.

python examples/offline.py [MODEL]
"""

import sys

from jaxserve import LLM, SamplingParams


def main(model: str = "tiny") -> None:
    llm = LLM(model, max_model_len=512, max_num_seqs=8)

    prompts = ["def read_lines(path):", "import os\n", "class Stack:\n    "]
    for out in llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=32)):
        done = out.outputs[0]
        print(f"--- {out.prompt!r}: {len(done.token_ids)} tokens, ended by {done.finish_reason}")
        print(out.prompt + done.text)

    params = SamplingParams(temperature=0.8, top_p=0.95, n=3, seed=1, max_tokens=16, stop=["\n\n"])
    (out,) = llm.generate("def add(a, b):", params)
    for done in out.outputs:
        print(f"--- sample {done.index}: {done.text!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Which continuation does the model find likeliest? Log-probabilities instead of text.

python examples/score.py [MODEL]
"""

import sys

from jaxserve import LLM


def main(model: str = "tiny") -> None:
    llm = LLM(model, max_model_len=512, max_num_seqs=8)
    prompt = "for i in "
    continuations = ["range(10):\n", "banana(10):\n", "the meantime\n"]
    scores = llm.score(prompt, continuations)
    for text, score in sorted(zip(continuations, scores, strict=True), key=lambda pair: -pair[1].logprob):
        chosen = "greedy decoding would say this" if score.is_greedy else ""
        print(f"{score.logprob:9.3f}  {prompt + text!r}  {chosen}")


if __name__ == "__main__":
    main(*sys.argv[1:])

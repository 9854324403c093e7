"""OpenAI's client against our server, which this starts and ends by itself: `pip install 'jaxserve[server]' openai`.

python examples/client.py [MODEL]
"""

import subprocess
import sys

from openai import OpenAI

PORT = 8321


def main(model: str = "tiny") -> None:
    options = ["--port", str(PORT), "--max-model-len", "512", "--max-num-seqs", "8"]
    command = [sys.executable, "-m", "jaxserve", "serve", model, *options]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)  # noqa: S603
    # The client asks again when the port is not open yet, and when it hears 503: the model is being loaded.
    client = OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none", max_retries=100)
    try:
        talk = [{"role": "user", "content": "Write a function that adds two numbers."}]
        for chunk in client.chat.completions.create(model=model, messages=talk, max_tokens=48, stream=True):
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        scored = client.completions.create(model=model, prompt="import os", max_tokens=0, echo=True, logprobs=1)
        logprobs = scored.choices[0].logprobs
        print("\n", list(zip(logprobs.tokens, logprobs.token_logprobs, strict=True)))
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])

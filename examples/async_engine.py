"""Many tasks, one engine: answers stream side by side, and whoever loses patience takes the request along.

python examples/async_engine.py [MODEL]
"""

import asyncio
import sys

from jaxserve import SamplingParams
from jaxserve.async_engine import AsyncEngine

PROMPTS = ["def add(a, b):\n", "class Stack:\n", "for i in "]


async def show(engine: AsyncEngine, prompt: str) -> None:
    text = ""
    async for event in engine.submit(prompt, SamplingParams(temperature=0.0, max_tokens=48)):
        text += event.text
    print(f"--- {prompt!r}\n{text}")


async def main(model: str = "tiny") -> None:
    async with await AsyncEngine.load(model, max_model_len=512, max_num_seqs=8, progress=False) as engine:
        await asyncio.gather(*[show(engine, prompt) for prompt in PROMPTS])
        try:
            await asyncio.wait_for(engine.generate("while True:", SamplingParams(max_tokens=500)), timeout=0.05)
        except TimeoutError:
            print("--- too slow; requests left in the engine:", (await engine.metrics())["num_running"])


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

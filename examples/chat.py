"""One question about one text, streamed.

Run: python examples/chat.py [CHECKPOINT]
"""

import sys

import overleap
from overleap.chat.dialects import ask_prompt
from overleap.chat.profiles import profile_for
from overleap.chat.tokenizer import Tokenizer
from overleap.checkpoint import locate
from overleap.engine.request import Token


def main(name: str = "mini") -> None:
    folder = locate(name)
    tokenizer = Tokenizer.from_folder(folder)
    engine = overleap.Engine(overleap.load(folder), pages=64)
    text = "The color of Alice is green.\nThe city is quiet.\n"
    prompt = ask_prompt(text, "What is the color of Alice?", profile_for(folder))
    sampling = overleap.Sampling(temperature=0, max_tokens=12)
    request = overleap.Request(prompt=tokenizer.encode_prompt(prompt), sampling=sampling)
    decoder = tokenizer.decoder()
    for event in engine.stream(engine.submit(request)):
        if isinstance(event, Token):
            print(decoder.push(event.id), end="", flush=True)
    print(decoder.flush())


if __name__ == "__main__":
    main(*sys.argv[1:])

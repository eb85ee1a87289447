"""Several texts at once through the engine, by token ids.

Run: python examples/batch.py [CHECKPOINT]
"""

import sys

import overleap
from overleap.chat.tokenizer import Tokenizer
from overleap.checkpoint import locate
from overleap.engine.request import Token


def main(name: str = "mini") -> None:
    folder = locate(name)
    tokenizer = Tokenizer.from_folder(folder)
    engine = overleap.Engine(overleap.load(folder), pages=64)
    sampling = overleap.Sampling(temperature=0, max_tokens=16)
    texts = ["import os\n", "def main(", "class Error("]
    handles = [
        engine.submit(
            overleap.Request(prompt=[tokenizer.bos_id, *tokenizer.encode(text)], sampling=sampling)
        )
        for text in texts
    ]
    while engine.step():
        pass
    for text, handle in zip(texts, handles, strict=True):
        ids = [event.id for event in handle.events if isinstance(event, Token)]
        print(repr(text + tokenizer.decode(ids)))


if __name__ == "__main__":
    main(*sys.argv[1:])

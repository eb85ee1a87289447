"""Other programs beside ours: the same weights, the same token ids, one run.

Each program has a process of its own (worker.py), so that its memory is its own and is given back;
they are asked in turns (versus.py), so that a machine that slows down slows all of them.
Read next: program.py (what is asked), versus.py.
"""

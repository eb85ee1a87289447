"""How the bundled model is trained. Nothing here is needed to run a model. Start at loop.py."""

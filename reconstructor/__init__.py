"""One-shot 3D head reconstruction: networks, streaming training, evaluation, driving."""

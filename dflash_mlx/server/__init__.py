"""The model behind HTTP: an engine that runs requests in turns, and what answers over the wire."""

"""The models of a run behind an OpenAI-compatible HTTP server, every client a model name, all of them in one batch over one base."""

"""`bdh serve`: a server of one model."""

from dataclasses import dataclass

from bdh.cli.models import ModelSettings, load_for_generation
from bdh.cli.output import lasting_streams, show_kept
from bdh.cli.settings import command
from bdh.serve.config import ServeSettings


@dataclass(kw_only=True)
class ServeCommandSettings(ModelSettings, ServeSettings):
    """With what finds the model: ``bdh.serve`` does not know what a name stands for."""


@command("model")
@lasting_streams()
def run_serve(settings: ServeCommandSettings) -> int:
    """Serve a model over HTTP, with OpenAI's API."""
    from bdh.serve.server import serve

    show_kept()  # a server reports what happens as it happens
    return serve(settings, lambda: load_for_generation(settings))

"""bdh serve: serves a model over HTTP."""

from dataclasses import dataclass

from bdh.cli.models import ModelSettings, load_for_generation
from bdh.cli.output import lasting_streams, show_kept
from bdh.cli.settings import command
from bdh.serve.config import ServeSettings


@dataclass(kw_only=True)
class ServeCommandSettings(ModelSettings, ServeSettings):
    """The settings of the server, with those that locate the model, which :mod:`bdh.serve` does not do itself."""


@command("model")
@lasting_streams()
def run_serve(settings: ServeCommandSettings) -> int:
    """Serve a model over HTTP, with OpenAI's API."""
    from bdh.serve.server import serve

    show_kept()  # the log lines of a server are shown at once
    return serve(settings, lambda: load_for_generation(settings))

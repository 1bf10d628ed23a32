"""`bdh serve`: a server of one model."""

from dataclasses import dataclass

from bdh.cli.models import ReadsModel, load_for_generation
from bdh.cli.output import lasting_streams, show_kept
from bdh.cli.settings import command
from bdh.serve.config import ServeSettings
from bdh.validation import PathText


@dataclass(kw_only=True)
class ServeCommandSettings(ReadsModel, ServeSettings):
    """With the check that the model is there: ``bdh.serve`` does not know what a name stands for."""

    model: PathText
    """Folder of an exported model or of a run, or a hub id."""


@lasting_streams()
@command("model")
def run_serve(settings: ServeCommandSettings) -> int:
    """Serve a model over HTTP, with OpenAI's API."""
    from bdh.serve.server import serve

    show_kept()  # a server reports what happens as it happens
    return serve(settings, lambda: load_for_generation(settings))

"""bdh serve: an OpenAI-compatible server."""

from dataclasses import dataclass

from bdh.cli.models import ReadsModel, load_for_generation
from bdh.cli.output import lasting_streams
from bdh.cli.settings import parse_settings
from bdh.serve.config import ServeSettings
from bdh.validation import PathText


@dataclass(kw_only=True)
class _ServeSettings(ReadsModel, ServeSettings):
    """With the check that the model is there: ``bdh.serve`` does not know what a name stands for."""

    model: PathText
    """Folder of an exported model or of a run, or a hub id."""


@lasting_streams()
def run(argv: list[str]) -> int:
    settings = parse_settings(
        _ServeSettings,
        argv,
        prog="bdh serve",
        description="Serve a model over HTTP, with OpenAI's API.",
        positionals=("model",),
    )
    from bdh.cli.output import show_kept
    from bdh.serve.server import serve

    show_kept()  # a server tells what happens as it happens
    return serve(
        settings,
        lambda: load_for_generation(settings),
    )

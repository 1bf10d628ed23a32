"""bdh serve: an OpenAI-compatible server."""

from bdh.cli.settings import parse_settings
from bdh.cli.streams import lasting_streams
from bdh.serve.config import ServeSettings


def run(argv: list[str]) -> int:
    with lasting_streams():
        return _run(argv)


def _run(argv: list[str]) -> int:
    settings = parse_settings(
        ServeSettings,
        argv,
        prog="bdh serve",
        description="Serve a model over HTTP, with OpenAI's API.",
        positionals=("model",),
    )
    try:
        from bdh.serve.server import serve
    except ImportError as error:
        raise ImportError(f"bdh serve needs more packages ({error}): pip install 'bdh[serve]'") from error
    from bdh.cli.libraries import show_kept
    from bdh.train.models import load_model

    show_kept()  # a server tells what happens as it happens
    return serve(
        settings,
        lambda: load_model(settings.model, checkpoint=settings.checkpoint, base=settings.base, device=settings.device),
    )

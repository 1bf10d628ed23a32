"""A check that no source of a mix is trained on what another one holds out."""

from dataclasses import replace

from bdh.data.config import MixSource
from bdh.data.paths import file_key
from bdh.data.source import Source, training_source, validation_source


def check_overlap(sources: list[MixSource]) -> None:
    """Files of ``val_source`` are held out of every source; a share of a text is held out of the one source alone.

    Raises:
        ValueError: two sources read the same text, and one of them holds out a share of it; or one is trained on the
            split of a data set that another one is validated on.
        FileNotFoundError, OSError: as of :func:`bdh.data.source.training_source`.
    """
    if len(sources) < 2:
        return
    training = [training_source(source.config) for source in sources]
    validation = [validation_source(source.config) for source in sources]
    for first, source in enumerate(sources):
        for second, other in enumerate(sources):
            if replace(source.config, others=[]) == replace(other.config, others=[]):
                continue  # it holds out the same
            held_out = validation[first]
            common = _common(held_out or training[first], training[second])
            if common is None:
                continue
            if held_out is None:
                share = f"the share of it that {source.label!r} holds out"
                remedy = "name it in one entry only, or set val_source in each entry that reads it"
            else:
                share, remedy = f"what {source.label!r} holds out", "leave it out of one of them"
            raise ValueError(
                f"data.mix: {source.label!r} and {other.label!r} both read {common}, so {share} would be trained on through "
                f"{other.label!r}: {remedy}"
            )


def _common(one: Source, other: Source) -> str | None:
    """A text that both read, or None."""
    for name in sorted(one.names & other.names, key=str):
        return name[0] if len(name) == 1 else f"split {name[-1]!r} of {name[1]}"
    if one.is_hub and other.is_hub:
        return None  # other splits, perhaps of the same files
    known = {file_key(path) for path in one.files}
    return next((str(path) for path in other.files if file_key(path) in known), None)

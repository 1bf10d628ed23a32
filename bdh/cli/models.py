"""What commands have in common that read a model."""

from bdh.train.places import find_model
from bdh.validation import DeviceName, Settings


class ReadsModel(Settings):
    """Settings whose field ``model`` names a model, or none where it is None."""

    model: str | None
    checkpoint: str | None = None
    base: str | None = None
    device: DeviceName = "auto"

    def check_available(self) -> None:
        super().check_available()
        if self.model is not None:
            find_model(self.model, checkpoint=self.checkpoint, base=self.base)

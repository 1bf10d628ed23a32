"""What commands have in common that read a model."""

from bdh.train.config import require_device
from bdh.train.places import find_model
from bdh.validation import Faults, Settings


class ReadsModel(Settings):
    """Settings whose field ``model`` names a model, or none where it is None."""

    model: str | None
    checkpoint: str | None = None
    base: str | None = None
    device: str = "auto"

    def collect_faults(self, faults: Faults) -> None:
        super().collect_faults(faults)
        require_device(self.device, faults)

    def check_available(self) -> None:
        super().check_available()
        if self.model is not None:
            find_model(self.model, checkpoint=self.checkpoint, base=self.base)

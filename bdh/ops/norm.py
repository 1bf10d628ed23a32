"""Layer normalisation without parameters."""

import torch
import torch.nn.functional as F

HALF_DTYPES = (torch.float16, torch.bfloat16)


def layer_norm(v: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalises the last dimension of ``v``. Half precision is computed in, and returned as, float32."""
    wide = v.float() if v.dtype in HALF_DTYPES else v
    return F.layer_norm(wide, wide.shape[-1:], eps=eps)

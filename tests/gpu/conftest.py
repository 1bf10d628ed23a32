import pytest
import torch

from tests.model.conftest import byte_model, make_model, model, tokenizer, tokens  # noqa: F401 (fixtures)
from tests.train.conftest import text_file, train  # noqa: F401 (fixtures)

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def device(request):
    return request.param

from tests.model.conftest import byte_model, make_model, model, tokenizer  # noqa: F401 (fixtures)

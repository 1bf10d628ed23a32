import pytest
from transformers import AutoConfig

from bdh import BDHConfig


def test_every_field_survives_the_file(tmp_path):
    config = BDHConfig(
        vocab_size=300,
        n_embd=48,
        n_head=6,
        n_layer=5,
        mlp_internal_dim_multiplier=4,
        dropout=0.25,
        rope_theta=1e4,
        layer_norm_eps=1e-6,
        initializer_range=0.5,
        attention_form="chunked",
        chunk_size=32,
        decay=[1, 2.5, 3, 4, 5, None],
        use_cache=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=[2, 3],
    )
    config.save_pretrained(tmp_path)
    for read in (BDHConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(read) is BDHConfig
        ours, theirs = config.to_dict(), read.to_dict()
        for each in (ours, theirs):
            each.pop("_name_or_path", None)  # where it was read from
        assert theirs == ours
        assert read.eos_token_id == [2, 3]
        assert read.rope_theta == 1e4


def test_the_usual_names_are_aliases():
    config = BDHConfig(hidden_size=64, num_attention_heads=8, num_hidden_layers=3)
    assert (config.n_embd, config.n_head, config.n_layer) == (64, 8, 3)
    config.hidden_size = 32
    assert config.n_embd == config.hidden_size == 32
    assert "hidden_size" not in config.to_dict()


def test_derived_sizes():
    config = BDHConfig(n_embd=256, n_head=4, n_layer=6, mlp_internal_dim_multiplier=128)
    assert config.neurons_per_head == 8192
    assert config.state_bytes_per_sequence == 6 * 4 * 8192 * 256 * 4


def test_half_lives_double_from_head_to_head_or_are_given():
    assert BDHConfig().half_lives is None
    assert BDHConfig(decay=32).half_lives == [32, 64, 128, 256]
    assert BDHConfig(decay=[5, None, 0.5, 7]).half_lives == [5, float("inf"), 0.5, 7]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"n_embd": 32, "n_head": 3, "mlp_internal_dim_multiplier": 4},
            r"32 \* 4 = 128 neurons cannot be split over n_head = 3 heads: 128 % 3 = 2, must be 0",
        ),
        (
            {"n_embd": 15, "n_head": 5, "mlp_internal_dim_multiplier": 3},
            r"15 \* 3 / 5 = 9 neurons in a head: must be even",
        ),
        ({"n_embd": 0}, "n_embd is 0: must be at least 1"),
        ({"n_head": 0}, "n_head is 0: must be at least 1"),
        ({"n_layer": 0}, "n_layer is 0: must be at least 1"),
        ({"vocab_size": -1}, "vocab_size is -1: must be at least 1"),
        ({"mlp_internal_dim_multiplier": 0}, "mlp_internal_dim_multiplier is 0: must be at least 1"),
        ({"dropout": 1.0}, "dropout is 1.0: must be at least 0 and below 1"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"chunk_size": 0}, "chunk_size is 0: must be at least 1"),
        ({"attention_form": "flash"}, "attention_form is 'flash': must be one of auto, parallel, chunked, recurrent"),
        ({"rope_theta": 0.0}, "rope_theta is 0.0: must be a number above 0"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan: must be a number above 0"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True: must be False"),
        ({"decay": 0}, "decay is 0: must be half-lives in tokens, numbers above 0, or null"),
        ({"decay": float("inf")}, "decay is inf: must be half-lives in tokens"),
        ({"decay": [1.0, -2.0, 3.0, 4.0]}, r"decay is \[1.0, -2.0, 3.0, 4.0\]: must be half-lives"),
        ({"decay": [8.0]}, r"decay is \[8.0\]: must be one half-life for each of the n_head = 4 heads"),
        ({"n_layers": 3}, "n_layers is unknown: did you mean n_layer?"),
        ({"hidden_size": 64, "n_embd": 32}, "hidden_size is 64 and n_embd is 32"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(fields, message):
    with pytest.raises(ValueError, match=message):
        BDHConfig(**fields)


def test_all_faults_are_told_at_once():
    with pytest.raises(ValueError, match=r"n_layer is 0.*n_head is 0|n_head is 0.*n_layer is 0") as caught:
        BDHConfig(n_layer=0, n_head=0, dropout=2.0)
    assert "dropout is 2.0" in str(caught.value)


def test_other_tools_keys_are_kept(tmp_path):
    """Configurations on the hub carry keys of many tools: those are no misspelt fields."""
    BDHConfig(training_data="shakespeare").save_pretrained(tmp_path)
    assert BDHConfig.from_pretrained(tmp_path).training_data == "shakespeare"

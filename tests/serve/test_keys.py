import pytest

from bdh.serve.config import AuthSettings, Caller
from bdh.serve.middleware import ApiError, ApiKeys, RateLimits


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


ANN, BOB = Caller("a", "ann"), Caller("b", "bob")


def test_so_many_requests_a_minute_come_back_evenly(clock):
    rates = RateLimits(AuthSettings(requests_per_minute=6), clock)
    for _ in range(6):
        rates.begin(ANN)
    with pytest.raises(ApiError) as found:
        rates.begin(ANN)
    assert found.value.status == 429
    assert found.value.headers() == {"Retry-After": "10"}
    rates.begin(BOB)
    clock.now += 9.9
    with pytest.raises(ApiError):
        rates.begin(ANN)
    clock.now += 0.2
    rates.begin(ANN)
    with pytest.raises(ApiError):
        rates.begin(ANN)


def test_tokens_are_paid_when_they_are_known(clock):
    rates = RateLimits(AuthSettings(tokens_per_minute=600), clock)
    rates.begin(ANN)
    rates.charge(ANN, 1200)
    with pytest.raises(ApiError) as found:
        rates.begin(ANN)
    assert found.value.headers() == {"Retry-After": "60"}
    clock.now += 59
    with pytest.raises(ApiError):
        rates.begin(ANN)
    clock.now += 1.1
    rates.begin(ANN)


def test_a_refused_request_is_not_counted(clock):
    rates = RateLimits(AuthSettings(requests_per_minute=1, tokens_per_minute=60), clock)
    rates.charge(ANN, 70)
    for _ in range(5):
        with pytest.raises(ApiError, match="tokens a minute"):
            rates.begin(ANN)
    clock.now += 11
    rates.begin(ANN)


def test_without_limits_nothing_is_kept(clock):
    rates = RateLimits(AuthSettings(), clock)
    for _ in range(1000):
        rates.begin(ANN)
        rates.charge(ANN, 10**6)
    assert not rates.used


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("short", "has 5 characters"),
        ("long-enough\nann long-enough", "is given twice"),
        ("# nothing\n\n", "has no key"),
    ],
)
def test_a_wrong_file_of_keys_is_refused_without_telling_them(tmp_path, text, told):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ValueError, match=told) as found:
        ApiKeys(AuthSettings(keys_file=str(tmp_path / "keys")))
    assert "long-enough" not in str(found.value)


def test_names_stand_for_keys_in_the_log(tmp_path, monkeypatch):
    (tmp_path / "keys").write_text("ann of sales   a-long-secret # since May\n")
    monkeypatch.setenv("OTHER", "another-secret, eve of support third-secret,")
    keys = ApiKeys(AuthSettings(keys_file=str(tmp_path / "keys"), keys_variable="OTHER"))
    assert keys.caller("Bearer a-long-secret", "1.2.3.4").name == "ann of sales"
    assert keys.caller("bearer another-secret", "1.2.3.4").name.startswith("key-")
    assert keys.caller("Bearer third-secret", "1.2.3.4").name == "eve of support"
    for header in (None, "", "Bearer", "Bearer ", "Basic a-long-secret", "Bearer A-long-secret", "Bearer \udcff"):
        with pytest.raises(ApiError) as found:
            keys.caller(header, "1.2.3.4")
        assert found.value.status == 401
        assert found.value.headers()["WWW-Authenticate"] == "Bearer"


def test_without_keys_each_address_is_a_caller():
    keys = ApiKeys(AuthSettings(keys_variable="NOTHING_HERE"))
    assert not keys.are_needed
    assert keys.caller(None, "1.2.3.4").id != keys.caller("Bearer what", "1.2.3.5").id

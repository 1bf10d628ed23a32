"""What is asked of the hub, and what is a path that is not there."""

import pytest
from huggingface_hub import constants

from bdh import hub
from bdh.data.files import check_item
from bdh.tokenizer.config import check_tokenizer_there
from bdh.train.places import find_model


@pytest.fixture(autouse=True)
def online(tmp_path, monkeypatch):
    """In a folder that holds runs/demo-2, with an empty cache of the hub, which nothing says that it cannot be reached."""
    (tmp_path / "work" / "runs" / "demo-2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


CHECKS = {"model": find_model, "tokenizer": check_tokenizer_there, "data": check_item}


@pytest.mark.parametrize("kind", CHECKS)
def test_a_name_that_begins_with_a_folder_that_is_here_is_not_asked_of_the_hub(kind):
    """It took half a minute of retries, and the error spoke of the hub."""
    reason = r"and the hub was not asked for it, as runs is a local folder; did you mean runs/demo-2\?"
    with pytest.raises(FileNotFoundError, match=f"there is no (such )?(file or )?folder.*, {reason}"):
        CHECKS[kind]("runs/demo")


@pytest.mark.parametrize("kind", CHECKS)
def test_a_name_of_a_run_is_not_asked_of_the_hub_in_another_folder(kind, online, monkeypatch):
    monkeypatch.chdir(online)
    with pytest.raises(FileNotFoundError, match="as bdh train keeps its runs in runs, which does not exist here"):
        CHECKS[kind]("runs/demo")


@pytest.mark.parametrize("name", ["org/name", "org/na.me-2", "_org/name"])
@pytest.mark.parametrize("kind", CHECKS)
def test_names_of_the_hub_are_asked(kind, name):
    CHECKS[kind](name)


def test_a_tokenizer_and_a_data_set_may_have_one_name():
    check_tokenizer_there("gpt2")
    check_item("imdb")


@pytest.mark.parametrize("kind", CHECKS)
def test_what_was_fetched_from_the_hub_is_found_though_a_folder_has_its_organisations_name(kind, online):
    of_hub = "datasets--runs--demo" if kind == "data" else "models--runs--demo"
    (online / "hub" / of_hub / "snapshots").mkdir(parents=True)
    CHECKS[kind]("runs/demo")


@pytest.mark.parametrize("name", ["./a", "/a/b", "~/a", "a\\b", "a/b/c", "a/", "two words"])
def test_paths(name):
    assert hub.is_path(name)


@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_without_the_hub_the_error_comes_before_anything_is_loaded(kind, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="it is not in the hub's cache, and HF_HUB_OFFLINE is set"):
        CHECKS[kind]("org/name")

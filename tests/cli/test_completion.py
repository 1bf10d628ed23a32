import shutil
import subprocess

import pytest

from bdh.cli.main import COMMANDS, main

COMPLETE = """
source "$0"
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_shtab_bdh
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    import contextlib
    import io

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert main(["completion", "bash"]) == 0
    path = tmp_path_factory.mktemp("completion") / "bdh.sh"
    path.write_text(shown.getvalue())
    return path


def completed(script, *words):
    run = subprocess.run(["bash", "-c", COMPLETE, script, *words], capture_output=True, text=True, check=True)
    return run.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("bdh", ""), COMMANDS),
        (("bdh", "se"), ["serve"]),
        (("bdh", "train", "--train.layer_p"), ["--train.layer_path"]),
        (("bdh", "train", "--train.layer_path", ""), ["auto", "kernels", "torch", "plain"]),
        (("bdh", "tokenizer", ""), ["train"]),
        (("bdh", "tokenizer", "train", "--kind", "u"), ["unigram"]),
        (("bdh", "export", "--em"), ["--ema"]),
    ],
)
def test_bash_completes(script, words, expected):
    assert set(completed(script, *words)) - {"-h", "--help"} == set(expected)


@pytest.mark.parametrize("shell", ["zsh", "fish", "tcsh", "powershell"])
def test_other_shells_have_a_script_with_all_commands(shell, capsys):
    assert main(["completion", shell]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)

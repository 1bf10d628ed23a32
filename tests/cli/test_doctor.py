import bdh
from bdh.cli import doctor
from bdh.cli.main import main
from bdh.extras import install_command


def test_doctor_says_what_there_is(capsys):
    assert main(["doctor", "--speed", "false"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"bdh      bdh {bdh.__version__}, Python 3.")
    named = {line.split()[0] for line in lines}
    assert {"packages", "CPU", "memory", "GPU", "kernels", "disk", "serve", "finetune", "report"} <= named
    assert "speed" not in named
    assert len(lines) <= 24  # a screen


def test_what_is_broken_is_named_and_the_rest_is_still_shown(capsys, monkeypatch):
    def broken():
        raise RuntimeError("no such thing\nand more")

    monkeypatch.setitem(doctor.LINES, "memory", broken)
    assert main(["doctor", "--speed", "false"]) == 1
    shown = capsys.readouterr().out
    assert "memory   FAILS: RuntimeError: no such thing\n" in shown
    assert "\nkernels " in shown


def test_a_missing_package_is_named_with_what_brings_it(capsys, monkeypatch):
    monkeypatch.setitem(doctor.EXTRAS, "serve", ("bdh serve", ("fastapi", "no_such_package")))
    assert main(["doctor", "--speed", "false"]) == 0
    assert f"no_such_package missing: {install_command('serve')}" in capsys.readouterr().out


def test_speed_is_that_of_the_kernels():
    text = doctor.LINES["speed"]()
    assert "tokens/s (sparse kernels on the cpu" in text

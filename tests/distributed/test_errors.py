import textwrap

import pytest

from tests.distributed.conftest import run_together


@pytest.mark.slow
def test_an_error_of_one_process_ends_all_and_is_named(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(
        textwrap.dedent(
            """
            from bdh.distributed.config import reported_to_torchrun
            from bdh.distributed.world import World

            with reported_to_torchrun():
                world = World.join("cpu")
                if world.rank == 1:
                    raise ValueError("there is no such star")
                world.wait_for_all()
                print("rank 0 went on")
            """
        )
    )
    done = run_together(2, str(script))
    assert done.returncode != 0
    assert "ValueError: there is no such star" in done.stderr
    assert "on rank 1 of 2 processes" in done.stderr
    assert "rank 0 went on" not in done.stdout
